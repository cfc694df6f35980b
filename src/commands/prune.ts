import { ExitCode } from '../errors.js';
import { parseDurationMs } from '../human.js';
import { defineCommand, type Input, type OptionSpecs } from './spec.js';

const args = {} as const;
const options = {
  grace: {
    value: 'TIME',
    description:
      'how long data must have been unused before it is condemned, and condemned before it is deleted',
    default: '1d',
    parse: parseDurationMs,
  },
  'dry-run': { description: 'only say what would be done' },
} as const satisfies OptionSpecs;
export type PruneInput = Input<typeof args, typeof options>;

export const pruneCommand = defineCommand({
  name: 'prune',
  summary: 'give back the space of data that no point needs',
  description: [
    'Works in two steps with a grace time between, so that it can run beside captures: what no point of any volume uses is condemned; a later run deletes what is still unused by then. Packs that are mostly used are rewritten without the rest.',
    'It refuses to work while the history of a volume cannot be read whole: then nobody can say what is unused.',
  ],
  arguments: args,
  options,
  examples: [
    { command: 'b2 prune', text: 'Daily, after thinning.' },
    { command: 'b2 prune --dry-run', text: 'What would be condemned now.' },
  ],
  exitCodes: { [ExitCode.leaseHeld]: 'another prune or repair is running' },
  load: () => import('./run/prune.js'),
});
