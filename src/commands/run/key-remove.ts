import type { Style } from '../../ui/style.js';
import type { KeyRemoveInput } from '../key-remove.js';
import type { CommandContext, Outcome } from '../spec.js';
import { withRepository } from './session.js';

export interface KeyRemoveResult {
  readonly id: string;
  readonly label: string;
  readonly left: number;
}

export function run(
  context: CommandContext,
  input: KeyRemoveInput,
): Promise<Outcome<KeyRemoveResult>> {
  return withRepository(context, async (repo) => {
    const key = await repo.removeKey(input.arguments.id);
    return { data: { id: key.id, label: key.label, left: repo.config.keys.length } };
  });
}

export function text(data: KeyRemoveResult, style: Style): string {
  return `${style.green('removed')} key ${data.id} (${data.label}); ${data.left} left`;
}
