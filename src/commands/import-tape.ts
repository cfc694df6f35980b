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
const options = {
  list: { description: 'only say what is on the cartridge' },
  to: {
    value: 'TARGET',
    description: 'write one point straight to this block device or image file',
    complete: 'device',
  },
  volume: {
    value: 'V',
    description: 'with --to: the volume; default the only one on the cartridge',
  },
  at: {
    value: 'T',
    description:
      'with --to: the newest exact point not after this time, a snapshot, or a point (#12)',
    default: 'latest',
  },
  force: { description: 'with --to: overwrite what is on the target (never what is in use)' },
  'no-verify': { description: 'with --to: do not read the target back after writing' },
  'next-cartridge': {
    value: 'CMD',
    description:
      'command that puts the next cartridge into the drive; default: ask on the terminal',
  },
  changer: {
    value: 'DEVICE',
    description: 'changer (/dev/sg3) that brings cartridges, driven by mtx',
    complete: 'device',
  },
} as const satisfies OptionSpecs;
export type ImportTapeInput = Input<typeof args, typeof options>;

export const importTapeCommand = defineCommand({
  name: 'import-tape',
  summary: 'restore from tape: a volume to a device, or the whole repository',
  description: [
    'With --to one point is written to a device or image file in one pass over the tape, without a repository and without room for one. Otherwise the repository is brought back at --repo, which must hold none: every point of the cartridges that are read.',
    'Start with the newest cartridge of the set, which has the newest points, or another one that has the point; further ones that are needed are asked for by their label, as far as it is known, and may come in any order. Where one is missing or damaged, everything else is restored, and what is not is listed: ranges that are zeros now with --to, points that are not whole otherwise (code 3).',
    'The password or key file is that of the repository that was exported, given as for any other command.',
  ],
  arguments: args,
  options,
  examples: [
    { command: 'b2 import-tape /dev/nst0 --list', text: 'The points on the cartridge.' },
    {
      command: 'b2 import-tape /dev/nst0 --volume web1/sda --to /dev/sdb',
      text: 'A disk as it was, straight from tape.',
    },
    {
      command: 'b2 --repo /srv/b2 import-tape /dev/nst0',
      text: 'On a new machine: the repository again.',
    },
  ],
  exitCodes: {
    [ExitCode.partial]: 'restored, but for what was on missing or damaged cartridges',
    [ExitCode.notFound]: 'no such volume or point, or no cartridge in the drive',
    [ExitCode.damage]: 'nothing on the cartridge can be used',
    [ExitCode.noRepository]: 'there is a repository at the place already',
    [ExitCode.wrongKey]: 'wrong password or key',
  },
  load: () => import('./run/import-tape.js'),
});
