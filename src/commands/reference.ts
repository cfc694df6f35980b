/** What holds for every command, as data: global options, exit codes, environment, files. */
import { ExitCode } from '../errors.js';
import type { OptionSpecs } from './spec.js';

/** Understood before and after the command's name. */
export const GLOBAL_OPTIONS = {
  repo: {
    value: 'URL',
    complete: 'directory',
    description:
      'repository: /path, file:///path, ssh://[user@]host[:port]/path or s3:https://endpoint/bucket[/prefix]',
  },
  config: {
    value: 'FILE',
    complete: 'file',
    description: 'read this configuration file and no other',
  },
  'password-file': {
    value: 'FILE',
    complete: 'file',
    description: 'file whose first line is the password of the repository',
  },
  'key-file': {
    value: 'FILE',
    complete: 'file',
    description: 'key file that opens the repository',
  },
  json: {
    description: 'answer as JSON on stdout; progress, warnings and errors as JSON lines on stderr',
  },
  quiet: { short: 'q', description: 'no progress and no notes' },
  verbose: { short: 'v', description: 'more details, and the causes of errors' },
} as const satisfies OptionSpecs;

/** Exit codes with the meaning they have for every command. */
export const EXIT_CODES: Readonly<Record<ExitCode, string>> = {
  [ExitCode.ok]: 'done',
  [ExitCode.failed]: 'failed; the message says why',
  [ExitCode.usage]: 'wrong usage or configuration',
  [ExitCode.partial]: 'done in part: something could not be read, written or delivered',
  [ExitCode.notFound]: 'no recovery point, volume, snapshot or path of that name or time',
  [ExitCode.damage]: 'damage was found',
  [ExitCode.overLimit]: 'lag or age is over the limit asked for',
  [ExitCode.noRepository]: 'there is no repository there (init: there is one already)',
  [ExitCode.leaseHeld]: "held by another's lease",
  [ExitCode.wrongKey]: 'wrong password or key',
  [ExitCode.interrupted]: 'interrupted, cleanly',
};

interface Described {
  readonly name: string;
  readonly description: string;
}

export const ENVIRONMENT: readonly Described[] = [
  { name: 'B2_REPOSITORY', description: 'URL of the repository, as --repo.' },
  { name: 'B2_CONFIG', description: 'Configuration file, as --config.' },
  { name: 'B2_PASSWORD', description: 'Password of the repository.' },
  { name: 'B2_PASSWORD_FILE', description: 'File whose first line is the password.' },
  { name: 'B2_PASSWORD_COMMAND', description: 'Shell command that prints the password.' },
  { name: 'B2_KEY_FILE', description: 'Key file that opens the repository.' },
  { name: 'B2_CACHE_DIR', description: 'Directory of the local catalogue, a cache.' },
  {
    name: 'B2_RUNTIME_DIR',
    description:
      'Directory of the control sockets of b2 watch; default /run/b2 for root, $XDG_RUNTIME_DIR/b2 for others.',
  },
  {
    name: 'CREDENTIALS_DIRECTORY',
    description: 'Set by systemd; the credential b2-password in it is used as the password.',
  },
  { name: 'NO_COLOR', description: 'Any value: no colours.' },
];

export const FILES: readonly Described[] = [
  { name: '/etc/b2/config.yaml', description: 'Configuration of the machine.' },
  {
    name: '$XDG_CONFIG_HOME/b2/config.yaml',
    description:
      "Configuration of the user (~/.config/b2/config.yaml); its keys win over the machine's.",
  },
  { name: '/var/lib/b2/repo', description: 'Default repository of root.' },
  {
    name: '$XDG_DATA_HOME/b2/repo',
    description: 'Default repository of everybody else (~/.local/share/b2/repo).',
  },
];
