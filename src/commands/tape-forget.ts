import { ExitCode } from '../errors.js';
import { defineCommand, type ArgumentSpecs, type Input, type OptionSpecs } from './spec.js';

const args = {
  label: { label: 'LABEL', description: 'label of the cartridge' },
} as const satisfies ArgumentSpecs;
const options = {} as const satisfies OptionSpecs;
export type TapeForgetInput = Input<typeof args, typeof options>;

export const tapeForgetCommand = defineCommand({
  name: 'tape forget',
  summary: 'no longer count on a cartridge that is lost',
  description: [
    'Forgets what a cartridge holds. The next export --since-last writes again what was only there. The cartridge itself is not touched; should it turn up, it can be read as before.',
  ],
  arguments: args,
  options,
  examples: [{ command: 'b2 tape forget offsite-003', text: 'It was lost in the post.' }],
  exitCodes: { [ExitCode.notFound]: 'no cartridge of that label' },
  load: () => import('./run/tape-forget.js'),
});
