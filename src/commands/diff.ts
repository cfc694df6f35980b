import { ExitCode } from '../errors.js';
import { BACKEND_TEXT, FILES_OPTIONS, PATH_TEXT } from './files-options.js';
import { defineCommand, type ArgumentSpecs, type Input, type OptionSpecs } from './spec.js';

const args = {
  place: { label: 'VOLUME[:PATH]', description: 'volume, and a path in it' },
} as const satisfies ArgumentSpecs;
const options = {
  from: { value: 'T', description: 'the earlier time, snapshot or point (#12)' },
  to: {
    value: 'T',
    description: 'the later time, snapshot or point (#12)',
    default: 'latest',
  },
  content: {
    description: 'read files of the same size whose inode or times are others, and compare them',
  },
  backend: FILES_OPTIONS.backend,
} as const satisfies OptionSpecs;
export type DiffInput = Input<typeof args, typeof options>;

export const diffCommand = defineCommand({
  name: 'diff',
  summary: 'list the files that changed between two points',
  description: [
    'Lists files added (+), removed (-), renamed (R) and changed (M, with what of them: content, size, mtime, mode, owner, type, target of a link) between two points of a volume, in all its file systems, or at a path and below. Of directories only type, mode and owner count. A file system no block of which changed is not even mounted.',
    'Files are compared by what the file system says of them: another size is other content; of the same size with another inode or other times, the content may be the same, and --content reads both to tell. "ctime" alone says that something was done to the file that nothing else shows, such as writing to it and putting its time back. What has a new name but the same inode, kind, size and time counts as renamed; below a renamed directory only what else changed is listed.',
    PATH_TEXT,
    BACKEND_TEXT,
  ],
  arguments: args,
  options,
  examples: [
    {
      command: 'b2 diff web1/data --from "1d ago"',
      text: 'What changed since yesterday.',
    },
    {
      command: 'b2 diff web1/sda:p2/etc --from before-upgrade --to after-upgrade --content',
      text: 'What an upgrade did to a directory, between two snapshots.',
    },
  ],
  exitCodes: {
    [ExitCode.notFound]:
      'no such volume, point or file system, or the path is there at neither point',
    [ExitCode.partial]: 'a file system of several could not be compared',
    [ExitCode.damage]: 'data in the repository is damaged',
  },
  load: () => import('./run/diff.js'),
});
