import { bashCompletion } from '../shells/bash.js';
import { fishCompletion } from '../shells/fish.js';
import { zshCompletion } from '../shells/zsh.js';
import type { CompletionInput } from '../completion.js';
import type { CommandContext, Outcome } from '../spec.js';

export interface CompletionResult {
  readonly shell: 'bash' | 'zsh' | 'fish';
  readonly script: string;
}

const WRITERS = { bash: bashCompletion, zsh: zshCompletion, fish: fishCompletion } as const;

export function run(
  _context: CommandContext,
  input: CompletionInput,
): Promise<Outcome<CompletionResult>> {
  const { shell } = input.arguments;
  return Promise.resolve({ data: { shell, script: WRITERS[shell]() } });
}

export function text(data: CompletionResult): string {
  return data.script;
}
