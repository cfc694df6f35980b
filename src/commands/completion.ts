import { defineCommand, type ArgumentSpecs, type Input } from './spec.js';

const args = {
  shell: {
    label: 'SHELL',
    description: 'the shell to write completions for',
    choices: ['bash', 'zsh', 'fish'],
  },
} as const satisfies ArgumentSpecs;
const options = {} as const;

export type CompletionInput = Input<typeof args, typeof options>;

export const completionCommand = defineCommand({
  name: 'completion',
  summary: 'print the completion script of a shell',
  description: [
    'Prints a script that makes the shell complete the commands, options and values of b2. It is made from the same descriptions as the help texts.',
    'bash: put it into /etc/bash_completion.d/b2 or ~/.local/share/bash-completion/completions/b2. zsh: into a file _b2 in a directory of $fpath. fish: into ~/.config/fish/completions/b2.fish.',
  ],
  arguments: args,
  options,
  examples: [
    {
      command: 'b2 completion bash > /etc/bash_completion.d/b2',
      text: 'Completion for every user of bash, from the next login on.',
    },
    {
      command: 'b2 completion fish > ~/.config/fish/completions/b2.fish',
      text: 'Completion for your own fish.',
    },
  ],
  load: () => import('./run/completion.js'),
});
