import { ExitCode } from '../errors.js';
import { defineCommand, type Input, type OptionSpecs } from './spec.js';

const args = {} as const;
const options = {
  volume: { value: 'VOLUME', description: 'only those of this volume' },
  tag: {
    value: 'TAG',
    description: 'only those with this tag',
    many: true,
  },
} as const satisfies OptionSpecs;
export type SnapshotsInput = Input<typeof args, typeof options>;

export const snapshotsCommand = defineCommand({
  name: 'snapshots',
  summary: 'list the named points of all volumes',
  description: [
    'A snapshot is a recovery point with a name. It is pinned: thinning never removes it.',
  ],
  arguments: args,
  options,
  examples: [
    { command: 'b2 snapshots', text: 'All of them.' },
    {
      command: 'b2 snapshots --volume web1/sda --tag monthly',
      text: 'The monthly ones of one volume.',
    },
  ],
  exitCodes: { [ExitCode.notFound]: 'no such volume' },
  load: () => import('./run/snapshots.js'),
});
