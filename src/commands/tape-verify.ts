import { ExitCode } from '../errors.js';
import { defineCommand, type ArgumentSpecs, type Input, type OptionSpecs } from './spec.js';

const args = {
  device: {
    label: 'DEVICE',
    description:
      'tape drive (/dev/nst0), or file:PATH: a directory or file standing in for a cartridge',
    complete: 'device',
  },
} as const satisfies ArgumentSpecs;
const options = {} as const satisfies OptionSpecs;
export type TapeVerifyInput = Input<typeof args, typeof options>;

export const tapeVerifyCommand = defineCommand({
  name: 'tape verify',
  summary: 'read a whole cartridge and check every chunk on it',
  description: [
    'Reads everything on the cartridge in the drive, opens every frame, compares every chunk with its id, and looks whether all is there that should be. Damage is named by file, record, pack and frame, with the points that it touches.',
    'No repository is needed. Where there is one that knows the cartridge, it remembers the result: damaged packs do not count as written any more, so that the next export --since-last writes them again.',
  ],
  arguments: args,
  options,
  examples: [{ command: 'b2 tape verify /dev/nst0', text: 'The cartridge in the drive.' }],
  exitCodes: {
    [ExitCode.notFound]: 'no cartridge in the drive',
    [ExitCode.damage]: 'damage found',
    [ExitCode.wrongKey]: 'wrong password or key',
  },
  load: () => import('./run/tape-verify.js'),
});
