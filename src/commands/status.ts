import { ExitCode } from '../errors.js';
import { parseDurationMs } from '../human.js';
import { defineCommand, type Input, type OptionSpecs } from './spec.js';

const args = {} as const;
const options = {
  'max-lag': {
    value: 'TIME',
    description: 'end with code 6 if the newest exact point of a volume is older',
    parse: parseDurationMs,
  },
  nagios: { description: 'one line and the exit codes of a monitoring plugin' },
} as const satisfies OptionSpecs;
export type StatusInput = Input<typeof args, typeof options>;

export const statusCommand = defineCommand({
  name: 'status',
  summary: 'show how well the volumes are covered, and how the repository is',
  description: [
    'For each volume: the newest exact point, its age (lag), and how well the last 24 hours are covered: exact (every write is in a point), coalesced (several writes to one block may be one), unknown (changes were found by comparing).',
    'Of each device that a running watch of this user captures: its state, the lag (age of the oldest write that no durable point holds), rates, points, and the last problem. The lag of a watched volume, also for --max-lag, is that of the watch: a volume that nobody writes to has no new points and still does not lag.',
    'Of the repository: its size, free space, what prune has condemned but not deleted yet, and when and with what result this machine verified it last.',
  ],
  arguments: args,
  options,
  examples: [
    { command: 'b2 status', text: 'An overview.' },
    { command: 'b2 status --max-lag 5m --nagios', text: 'As a monitoring check.' },
  ],
  exitCodes: {
    [ExitCode.overLimit]: 'a volume lags more than --max-lag',
    [ExitCode.damage]: 'the history of a volume cannot be read',
  },
  load: () => import('./run/status.js'),
});
