import { ExitCode } from '../errors.js';
import { BACKEND_TEXT, FILES_OPTIONS, PATH_TEXT } from './files-options.js';
import { defineCommand, type ArgumentSpecs, type Input, type OptionSpecs } from './spec.js';

const args = {
  place: { label: 'VOLUME:PATH', description: 'volume, and a file in it' },
} as const satisfies ArgumentSpecs;
const options = { ...FILES_OPTIONS } as const satisfies OptionSpecs;
export type CatInput = Input<typeof args, typeof options>;

export const catCommand = defineCommand({
  name: 'cat',
  summary: 'print a file inside a volume as it was',
  description: [
    'Writes the contents of one file to the standard output, as it was at a point in time. Symbolic links are followed inside the file system. A file that cannot be read to its end is an error, whatever has been written by then.',
    PATH_TEXT,
    BACKEND_TEXT,
  ],
  arguments: args,
  options,
  examples: [
    { command: 'b2 cat web1/sda:p2/etc/fstab', text: 'A file of the newest point.' },
    {
      command: 'b2 cat web1/data:/var/lib/app.db --at before-upgrade > app.db',
      text: 'A file as it was at a snapshot, to a file here.',
    },
  ],
  exitCodes: {
    [ExitCode.notFound]: 'no such volume, point, file system or path',
    [ExitCode.damage]: 'data in the repository is damaged',
  },
  load: () => import('./run/cat.js'),
});
