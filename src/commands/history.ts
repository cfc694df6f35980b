import { ExitCode } from '../errors.js';
import { parseWhole } from '../human.js';
import { BACKEND_TEXT, FILES_OPTIONS, PATH_TEXT } from './files-options.js';
import { defineCommand, type ArgumentSpecs, type Input, type OptionSpecs } from './spec.js';

/** `all`, or a whole number. */
function countOrAll(text: string, least: number): number {
  return text === 'all' ? Infinity : parseWhole(text, least);
}

const args = {
  place: { label: 'VOLUME:PATH', description: 'volume, and the path of a file in it' },
} as const satisfies ArgumentSpecs;
const options = {
  since: { value: 'T', description: 'only points from this time on' },
  until: { value: 'T', description: 'only points up to this time' },
  limit: {
    value: 'N',
    short: 'n',
    description: 'the newest N versions, or all',
    default: '20',
    parse: (t: string) => countOrAll(t, 1),
  },
  points: {
    value: 'WHICH',
    description: 'go over all exact points, or over the snapshots only',
    choices: ['all', 'snapshots'],
    default: 'all',
  },
  looks: {
    value: 'N',
    description:
      'points to look at between two times with the same version where a block near the file was written; all: every point that cannot be told from the manifest',
    default: '20',
    parse: (t: string) => countOrAll(t, 0),
  },
  backend: FILES_OPTIONS.backend,
} as const satisfies OptionSpecs;
export type HistoryInput = Input<typeof args, typeof options>;

export const historyCommand = defineCommand({
  name: 'history',
  summary: 'list every version of a file over time',
  description: [
    'Shows the versions of a file, the newest first: from which point to which it was there, with size, time of modification, owner, mode and SHA-256 of its content; times at which it was not there are versions too. "b2 cat VOLUME:PATH --at ID" and "b2 restore VOLUME DIRECTORY --path PATH --at ID" bring any of them back.',
    'Few points are looked at. A look notes which blocks of the volume tell what it found; at every point around it where the manifest says that these blocks are the same, the version is the same: that is proven, and costs no further look. (A journal changes with every write, so on a file system in use a proof reaches not far.) The places where one version ends and another begins are found by halving.',
    'Two looks that show the same inode with the same change time (which programs cannot set) say that nobody changed the file between them, unless the volume was written from outside, as by a restore onto it. Where the manifest says that no block of the file, its inode or its directories was written between, the points between are inferred to have that version; where one was (of a neighbour, perhaps), some more points are looked at (--looks), and the rest is inferred. Not noticed then is a directory on the way that was renamed away and back. --looks all infers nothing. How many points were looked at, proven, inferred and left unknown is said at the end.',
    PATH_TEXT,
    BACKEND_TEXT,
  ],
  arguments: args,
  options,
  examples: [
    { command: 'b2 history web1/sda:p2/etc/fstab', text: 'The newest twenty versions.' },
    {
      command: 'b2 history web1/data:/home/anna/thesis.odt --since "7d ago" --limit all',
      text: 'Every version of the last week.',
    },
    {
      command: 'b2 history web1/data:/srv/db.conf --points snapshots --looks all',
      text: 'Over the snapshots only, and nothing inferred.',
    },
  ],
  exitCodes: {
    [ExitCode.notFound]: 'no such volume, no point in that time, or the file is at none of them',
    [ExitCode.partial]: 'at some points it could not be told, because data is damaged',
  },
  load: () => import('./run/history.js'),
});
