/** Completion for fish 3 and later. */
import type { ArgumentSpec, CommandSpec, OptionSpec } from '../spec.js';
import { flagsWithValue, globalOptions, places, shellQuote, type OptionEntry } from './model.js';

/** fish knows two escapes inside single quotes: \\' and \\\\. */
function quote(text: string): string {
  return `'${text.replaceAll('\\', '\\\\').replaceAll("'", "\\'")}'`;
}

/** The flags of `complete` for what fits a value. */
function offer(spec: ArgumentSpec | OptionSpec): string {
  if (spec.choices !== undefined) return `-f -a ${quote(spec.choices.join(' '))}`;
  switch (spec.complete ?? 'none') {
    case 'file':
    case 'device':
      return '-F';
    case 'directory':
      return `-f -a '(__fish_complete_directories)'`;
    case 'command':
      return `-f -a '(__fish_complete_command)'`;
    case 'none':
      return '-f';
  }
}

function optionLine(condition: string, { name, spec }: OptionEntry): string {
  const short = spec.short === undefined ? '' : ` -s ${spec.short}`;
  const value = spec.value === undefined ? '' : ` -r ${offer(spec)}`;
  return `complete -c b2${condition}${short} -l ${name}${value} -d ${quote(spec.description)}`;
}

/** The script; in completions/b2.fish it completes `b2`. */
export function fishCompletion(commands?: readonly CommandSpec[]): string {
  const all = places(commands);
  const known = all.filter((place) => place.path !== '').map((place) => quote(place.path));
  const lines: string[] = [];
  for (const place of all) {
    const at = (test: string): string => ` -n ${shellQuote(test)}`;
    const here = at(`__b2_at ${quote(place.path)}`);
    for (const { word, summary } of place.words) {
      const first = at(`__b2_at ${quote(place.path)} 0`);
      lines.push(`complete -c b2${first} -f -a ${quote(word)} -d ${quote(summary)}`);
    }
    for (const entry of place.options) lines.push(optionLine(here, entry));
    for (const [i, argument] of place.arguments.entries()) {
      const position = argument.many === true ? '' : ` ${i}`;
      const line = `complete -c b2${at(`__b2_at ${quote(place.path)}${position}`)} ${offer(argument)}`;
      lines.push(line);
    }
  }
  for (const entry of globalOptions) lines.push(optionLine('', entry));
  return `# fish completion for b2, made by "b2 completion fish"

# True where the words so far name the command $argv[1] and, if given, $argv[2] arguments follow it.
function __b2_at
    set -l path ''
    set -l position 0
    set -l skip 0
    for word in (commandline -opc)[2..-1]
        if test $skip -eq 1
            set skip 0
            continue
        end
        switch $word
            case ${flagsWithValue(all).map(quote).join(' ')}
                set skip 1
            case '-*'
            case '*'
                set -l longer (string trim -- "$path $word")
                if test $position -eq 0; and contains -- $longer ${known.join(' ')}
                    set path $longer
                else
                    set position (math $position + 1)
                end
        end
    end
    test "$path" = "$argv[1]"; or return 1
    test (count $argv) -lt 2; or test $position -eq $argv[2]
end

complete -c b2 -f
${lines.join('\n')}`;
}
