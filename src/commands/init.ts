import { parseSize } from '../human.js';
import { ExitCode } from '../errors.js';
import { defineCommand, type Input, type OptionSpecs } from './spec.js';

const args = {} as const;
const options = {
  encryption: {
    value: 'KIND',
    description: 'how data are sealed: aes256 (AES-256-GCM) or none (checksums only)',
    choices: ['aes256', 'none'],
    default: 'aes256',
  },
  'chunk-size': {
    value: 'SIZE',
    description: 'the unit of storage and deduplication: 16K, 32K, 64K, 128K or 256K',
    parse: parseSize,
    default: '64K',
  },
  'pack-size': {
    value: 'SIZE',
    description: 'size at which a pack file is closed, 1M to 256M',
    parse: parseSize,
    default: '32M',
  },
} as const satisfies OptionSpecs;

export type InitInput = Input<typeof args, typeof options>;

export const initCommand = defineCommand({
  name: 'init',
  summary: 'make a repository',
  description: [
    'Makes a repository at the place that --repo, B2_REPOSITORY or the configuration names. It refuses a place where one is already.',
    'A repository is encrypted unless told otherwise. The first key is the password or key file of the settings; a key file that does not exist yet is made, readable by its owner only. On a terminal without either, a password is asked for twice. Keep a copy of the key somewhere else: without it nobody can read the repository.',
    'Chunk and pack size cannot be changed later.',
  ],
  arguments: args,
  options,
  examples: [
    {
      command: 'b2 --repo /srv/backup init',
      text: 'A repository on a local disk; asks for a password.',
    },
    {
      command: 'B2_KEY_FILE=/etc/b2/repo.key b2 --repo /srv/backup init',
      text: 'With a key file, which is made if it is not there.',
    },
    {
      command: 'b2 --repo /srv/backup init --encryption none',
      text: 'Without encryption; still checksummed.',
    },
  ],
  exitCodes: { [ExitCode.noRepository]: 'there is a repository already' },
  load: () => import('./run/init.js'),
});
