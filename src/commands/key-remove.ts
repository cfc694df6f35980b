import { ExitCode } from '../errors.js';
import { defineCommand, type ArgumentSpecs, type Input } from './spec.js';

const args = {
  id: { label: 'ID', description: 'id of the key, or the start of it, as "b2 key list" shows it' },
} as const satisfies ArgumentSpecs;
const options = {} as const;
export type KeyRemoveInput = Input<typeof args, typeof options>;

export const keyRemoveCommand = defineCommand({
  name: 'key remove',
  summary: 'remove a key from the repository',
  description: [
    'The last key cannot be removed. Who has used the removed key before may have kept the master key or an old copy of the file "config", and can still read the data with it: if a key has leaked, make a new repository.',
  ],
  arguments: args,
  options,
  examples: [
    {
      command: 'b2 key remove 3f9a2c',
      text: 'That password or key file no longer opens the repository.',
    },
  ],
  exitCodes: { [ExitCode.notFound]: 'no such key' },
  load: () => import('./run/key-remove.js'),
});
