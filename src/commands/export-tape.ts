import { ExitCode } from '../errors.js';
import { parseSize } from '../human.js';
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
  volume: { value: 'V', many: true, description: 'volume to export; default every one' },
  at: {
    value: 'T',
    many: true,
    description:
      'the newest exact point not after this time, a snapshot, or a point (#12); default latest',
  },
  snapshots: { description: 'every snapshot of these volumes too' },
  label: {
    value: 'L',
    description:
      'name of the set of cartridges, which are L-001, L-002, …; default that of the cartridge in the drive',
  },
  'since-last': { description: 'write only the chunks that the set does not hold yet' },
  force: { description: 'overwrite what is on the cartridge' },
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
  eject: { description: 'eject the cartridge at the end' },
  'no-verify': { description: 'do not read back what was written' },
  'record-size': {
    value: 'SIZE',
    description: 'size of the records of new cartridges, 4K to 1M',
    default: '256K',
    parse: parseSize,
  },
  'fixed-blocks': { description: 'use the fixed block mode of the drive' },
  'file-size': {
    value: 'SIZE',
    description: 'a file mark about every so many bytes',
    default: '1G',
    parse: parseSize,
  },
  'pack-size': {
    value: 'SIZE',
    description:
      'size of the packs made for the tape, 1M to 256M, and of packs of the repository that are written as they are; less for very small cartridges, default 16M and more for large exports',
    parse: parseSize,
  },
  buffer: {
    value: 'SIZE',
    description: 'memory that keeps the drive supplied',
    default: '128M',
    parse: parseSize,
  },
} as const satisfies OptionSpecs;
export type ExportTapeInput = Input<typeof args, typeof options>;

export const exportTapeCommand = defineCommand({
  name: 'export-tape',
  summary: 'write points of volumes to tape',
  description: [
    'Writes the newest exact point of every volume, or the points named, to the cartridge in the drive: as tar archives with file marks between them, which any tar reads, and which together are a repository. Nothing but the cartridges and the password or key file is needed to get the data back.',
    'A cartridge that b2 wrote for this repository is added to, behind what it holds; what an interrupted export left there is overwritten, also where that was its first. A blank one is labelled. Any other is refused without --force, with what is on it. When a cartridge is full the set goes on on the next one, which must be blank (or, with --force, not of this set).',
    'With --since-last only the chunks are written that no cartridge of the set holds; such a point needs those earlier cartridges too ("b2 tape list --needs").',
    'What was written is read back at the end of each cartridge. A command for the next cartridge gets B2_TAPE_DRIVE, B2_TAPE_SET, B2_TAPE_NUMBER, B2_TAPE_LABEL and B2_TAPE_PURPOSE in its environment and ends with code 0 when the cartridge is in.',
    'DEVICE can be file:PATH. A directory (a removable disk) holds each file of the tape as a file; a file, empty at first ("touch"), holds all of them, and "tar --ignore-zeros" reads it. The cartridge is full when its file system is; file:PATH?size=650M limits what fits before.',
  ],
  arguments: args,
  options,
  examples: [
    { command: 'b2 export-tape /dev/nst0', text: 'The newest point of every volume.' },
    {
      command: 'b2 export-tape /dev/nst0 --label offsite --since-last --eject',
      text: 'From a timer: what is new, to the set "offsite".',
    },
    {
      command: 'b2 export-tape /dev/nst0 --volume web1/sda --at before-upgrade --changer /dev/sg3',
      text: 'One point, with cartridges from a changer.',
    },
    { command: 'b2 export-tape file:/media/usb/b2', text: 'To a removable disk.' },
    {
      command: 'b2 export-tape file:/srv/offsite.tape',
      text: 'To one file that stands in for a cartridge.',
    },
  ],
  exitCodes: {
    [ExitCode.partial]: 'a volume that was not named has no such point and was left out',
    [ExitCode.notFound]: 'no such volume or point, or no cartridge in the drive',
    [ExitCode.damage]:
      'what was written could not be read back, or data in the repository is damaged',
    [ExitCode.noRepository]: 'no repository there',
    [ExitCode.wrongKey]: 'wrong password or key',
  },
  load: () => import('./run/export-tape.js'),
});
