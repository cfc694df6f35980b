import { ExitCode } from '../errors.js';
import { defineCommand, type Input, type OptionSpecs } from './spec.js';

const args = {} as const;
const options = {
  needs: { value: 'VOLUME', description: 'only the cartridges that a point of this volume needs' },
  at: {
    value: 'T',
    description:
      'with --needs: the newest exported point not after this time, or a snapshot or point (#12)',
    default: 'latest',
  },
  label: { value: 'L', description: 'only this set' },
} as const satisfies OptionSpecs;
export type TapeListInput = Input<typeof args, typeof options>;

export const tapeListCommand = defineCommand({
  name: 'tape list',
  summary: 'list the cartridges and what is on them',
  description: [
    'Lists the cartridges that the repository knows of, with their points. No drive is touched.',
    'With --needs: which cartridges must be at hand to restore a volume.',
  ],
  arguments: args,
  options,
  examples: [
    { command: 'b2 tape list', text: 'All cartridges.' },
    {
      command: 'b2 tape list --needs web1/sda --at "1w ago"',
      text: 'What to fetch from the vault.',
    },
  ],
  exitCodes: { [ExitCode.notFound]: 'no such volume, or no point of it on tape' },
  load: () => import('./run/tape-list.js'),
});
