import { ExitCode } from '../errors.js';
import { parseWhole } from '../human.js';
import { defineCommand, type ArgumentSpecs, type Input, type OptionSpecs } from './spec.js';

const args = {
  volume: { label: 'VOLUME', description: 'name or id of the volume' },
} as const satisfies ArgumentSpecs;
const options = {
  since: { value: 'T', description: 'only points from this time on' },
  until: { value: 'T', description: 'only points up to this time' },
  last: {
    value: 'N',
    short: 'n',
    description: 'only the newest N',
    parse: (t: string) => parseWhole(t, 1),
  },
  all: { description: 'also points that are not exact, and commits that are no point' },
} as const satisfies OptionSpecs;
export type PointsInput = Input<typeof args, typeof options>;

export const pointsCommand = defineCommand({
  name: 'points',
  summary: 'list the recovery points of a volume',
  description: [
    'Shows each exact point with its time, its class (crash: the state at one instant, as after a power cut; fs: file systems were frozen; app: an application was quiesced) and how the time since the point before is covered. Points of class fuzzy are not exact; they are shown with --all only.',
  ],
  arguments: args,
  options,
  examples: [
    { command: 'b2 points web1/sda --since "2h ago"', text: 'The points of the last two hours.' },
    { command: 'b2 points web1/sda -n 20', text: 'The newest twenty.' },
  ],
  exitCodes: { [ExitCode.notFound]: 'no such volume' },
  load: () => import('./run/points.js'),
});
