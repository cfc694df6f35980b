import { unmountByUser } from '../../mount/attach.js';
import type { Style } from '../../ui/style.js';
import type { CommandContext, Outcome } from '../spec.js';
import type { UmountInput } from '../umount.js';

export interface UmountAnswer {
  readonly mountpoint: string;
}

export async function run(
  _context: CommandContext,
  input: UmountInput,
): Promise<Outcome<UmountAnswer>> {
  return {
    data: { mountpoint: await unmountByUser(input.arguments.mountpoint, input.options.lazy) },
  };
}

export function text(data: UmountAnswer, _style: Style): string {
  return `unmounted ${data.mountpoint}`;
}
