/** Completion for bash 4 and later; needs no bash-completion package. */
import type { ArgumentSpec, CommandSpec, OptionSpec } from '../spec.js';
import { flagsOf, flagsWithValue, globalOptions, places, shellQuote, type Place } from './model.js';

/** The command that fills COMPREPLY with what fits a value. */
function offer(spec: ArgumentSpec | OptionSpec): string {
  if (spec.choices !== undefined) return `_b2_words ${shellQuote(spec.choices.join(' '))}`;
  switch (spec.complete ?? 'none') {
    case 'file':
    case 'device':
      return '_b2_files -f';
    case 'directory':
      return '_b2_files -d';
    case 'command':
      return '_b2_files -c';
    case 'none':
      return ':';
  }
}

function optionCases(all: readonly Place[]): readonly string[] {
  const lines: string[] = [];
  for (const place of all) {
    for (const entry of place.options) {
      if (entry.spec.value === undefined) continue;
      const patterns = flagsOf(entry).map((flag) => shellQuote(`${place.path}|${flag}`));
      lines.push(`    ${patterns.join('|')}) ${offer(entry.spec)}; return ;;`);
    }
  }
  for (const entry of globalOptions) {
    if (entry.spec.value === undefined) continue;
    const patterns = flagsOf(entry).map((flag) => `*${shellQuote(`|${flag}`)}`);
    lines.push(`    ${patterns.join('|')}) ${offer(entry.spec)}; return ;;`);
  }
  return lines;
}

function placeCases(all: readonly Place[]): readonly string[] {
  return all.flatMap((place) => {
    const flags = [...place.options, ...globalOptions].flatMap(flagsOf).join(' ');
    const lines = [`    ${shellQuote(place.path)})`, `      flags=${shellQuote(flags)}`];
    if (place.words.length > 0) {
      const words = place.words.map((word) => word.word);
      lines.push(
        `      words=${shellQuote([...words, ...(place.path === '' ? ['help'] : [])].join(' '))}`,
      );
    }
    lines.push('      ;;');
    return lines;
  });
}

function argumentCases(all: readonly Place[]): readonly string[] {
  return all.flatMap((place) =>
    place.arguments.map((argument, i) => {
      const pattern =
        argument.many === true
          ? `${shellQuote(`${place.path}|`)}*`
          : shellQuote(`${place.path}|${i}`);
      return `    ${pattern}) ${offer(argument)} ;;`;
    }),
  );
}

/** The script; sourced by bash, it completes `b2`. */
export function bashCompletion(commands?: readonly CommandSpec[]): string {
  const all = places(commands);
  const withWords = all.filter((place) => place.words.length > 0);
  const groupPatterns = withWords.flatMap((place) =>
    place.words.map((word) => shellQuote(`${place.path}|${word.word}`)),
  );
  return `# bash completion for b2, made by "b2 completion bash"

_b2_words() {
  mapfile -t COMPREPLY < <(compgen -W "$1" -- "$cur")
}

_b2_files() {
  compopt -o filenames 2>/dev/null
  mapfile -t COMPREPLY < <(compgen "$1" -- "$cur")
}

_b2() {
  local cur prev path='' position=0 i word flags='' words=''
  cur=\${COMP_WORDS[COMP_CWORD]}
  prev=\${COMP_WORDS[COMP_CWORD - 1]}
  COMPREPLY=()
  # "--option=value" arrives as three words.
  if [[ $cur == '=' ]]; then
    cur=''
  elif [[ $prev == '=' ]]; then
    prev=\${COMP_WORDS[COMP_CWORD - 2]}
  fi
  for ((i = 1; i < COMP_CWORD; i++)); do
    word=\${COMP_WORDS[i]}
    case $word in
      ${flagsWithValue(all).map(shellQuote).join('|')})
        [[ \${COMP_WORDS[i + 1]} == '=' ]] && ((i++))
        ((i++))
        ;;
      -*) ;;
      *)
        case "$path|$word" in
          ${groupPatterns.join('|')}) path="\${path:+$path }$word" ;;
          *) ((position++)) ;;
        esac
        ;;
    esac
  done
  case "$path|$prev" in
${optionCases(all).join('\n')}
  esac
  case $path in
${placeCases(all).join('\n')}
  esac
  if [[ $cur == -* ]]; then
    _b2_words "$flags"
    return
  fi
  if [[ -n $words && $position -eq 0 ]]; then
    _b2_words "$words"
    return
  fi
  case "$path|$position" in
${argumentCases(all).join('\n')}
    *) ;;
  esac
}

complete -F _b2 b2`;
}
