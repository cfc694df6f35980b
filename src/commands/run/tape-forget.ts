import { B2Error } from '../../errors.js';
import { forgetCartridge, listCartridges } from '../../tape/catalogue.js';
import type { CommandContext, Outcome } from '../spec.js';
import type { TapeForgetInput } from '../tape-forget.js';
import { withRepository } from './session.js';

export interface TapeForgetAnswer {
  readonly label: string;
  readonly set: string;
  readonly points: number;
}

export function run(
  context: CommandContext,
  input: TapeForgetInput,
): Promise<Outcome<TapeForgetAnswer>> {
  const { label } = input.arguments;
  return withRepository(context, async (repo) => {
    const warn = (message: string): void => context.events({ type: 'warning', message });
    const known = (await listCartridges(repo, warn)).find((c) => c.tape.label === label);
    if (known === undefined)
      throw new B2Error('not-found', `this repository knows no cartridge ${label}`, {
        hint: '"b2 tape list" shows them.',
      });
    await forgetCartridge(repo, label);
    const points = known.sessions.reduce((sum, s) => sum + s.points.length, 0);
    return { data: { label, set: known.tape.setName, points } };
  });
}

export function text(data: TapeForgetAnswer): string {
  return `forgot ${data.label} of the set "${data.set}": what was only there is written again by the next export --since-last`;
}
