import { ExitCode } from '../errors.js';
import { BACKEND_TEXT, FILES_OPTIONS, PATH_TEXT } from './files-options.js';
import { defineCommand, type ArgumentSpecs, type Input, type OptionSpecs } from './spec.js';

const args = {
  place: { label: 'VOLUME[:PATH]', description: 'volume, and a path in it' },
} as const satisfies ArgumentSpecs;
const options = {
  ...FILES_OPTIONS,
  long: { short: 'l', description: 'also mode, links, owner, size and time' },
  recursive: { short: 'R', description: 'everything below' },
} as const satisfies OptionSpecs;
export type LsInput = Input<typeof args, typeof options>;

export const lsCommand = defineCommand({
  name: 'ls',
  summary: 'list files inside a volume as it was',
  description: [
    'Lists a directory, or a file, of a file system inside a volume, as it was at a point in time. Without a path: the file systems, or the root if there is one only.',
    PATH_TEXT,
    BACKEND_TEXT,
  ],
  arguments: args,
  options,
  examples: [
    { command: 'b2 ls web1/sda', text: 'The file systems on it.' },
    { command: 'b2 ls web1/sda:p2/etc -l', text: 'A directory, with modes, owners and times.' },
    {
      command: 'b2 ls web1/data:/home/anna --at "2d ago" -R',
      text: 'Everything below a directory, as it was two days ago.',
    },
  ],
  exitCodes: {
    [ExitCode.notFound]: 'no such volume, point, file system or path',
    [ExitCode.damage]: 'data in the repository is damaged',
  },
  load: () => import('./run/ls.js'),
});
