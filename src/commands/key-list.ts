import { defineCommand, type Input } from './spec.js';

const args = {} as const;
const options = {} as const;
export type KeyListInput = Input<typeof args, typeof options>;

export const keyListCommand = defineCommand({
  name: 'key list',
  summary: 'list the keys that open the repository',
  description: [
    'Shows id, kind, label and time of each key. The key in use is marked. No secret is shown.',
  ],
  arguments: args,
  options,
  examples: [{ command: 'b2 key list', text: 'Which passwords and key files open it.' }],
  load: () => import('./run/key-list.js'),
});
