import { defineCommand, type Input, type OptionSpecs } from './spec.js';

const args = {} as const;
const options = {
  'new-password-file': {
    value: 'FILE',
    description: 'take the new password from the first line of FILE',
    complete: 'file',
  },
  'new-key-file': {
    value: 'FILE',
    description: 'add a key file; it is made if it does not exist',
    complete: 'file',
  },
  label: { value: 'TEXT', description: 'what to call the key in "b2 key list"' },
} as const satisfies OptionSpecs;
export type KeyAddInput = Input<typeof args, typeof options>;

export const keyAddCommand = defineCommand({
  name: 'key add',
  summary: 'add a password or key file to the repository',
  description: [
    'Every key opens the whole repository. Without an option a new password is asked for on the terminal. To change a password, add the new one and remove the old one; no data are rewritten.',
  ],
  arguments: args,
  options,
  examples: [
    {
      command: 'b2 key add --new-key-file /root/escrow.key --label escrow',
      text: 'A second key, to be kept in a safe.',
    },
    {
      command: 'b2 key add --new-password-file /run/secrets/new',
      text: 'A new password, from a script.',
    },
  ],
  load: () => import('./run/key-add.js'),
});
