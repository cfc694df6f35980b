/** Completion for zsh, by its own _arguments and _describe. */
import type { ArgumentSpec, CommandSpec, OptionSpec } from '../spec.js';
import { globalOptions, places, shellQuote, type OptionEntry, type Place } from './model.js';

/** For the parts of an _arguments specification, where colons and brackets are syntax. */
function plain(text: string): string {
  return text.replace(/[\\:[\]]/g, '\\$&');
}

function action(spec: ArgumentSpec | OptionSpec): string {
  if (spec.choices !== undefined) return `(${spec.choices.join(' ')})`;
  switch (spec.complete ?? 'none') {
    case 'file':
    case 'device':
      return '_files';
    case 'directory':
      return '_files -/';
    case 'command':
      return '_command_names -e';
    case 'none':
      // A space: a value is expected, and nothing can be offered for it.
      return ' ';
  }
}

function optionSpecs({ name, spec }: OptionEntry): readonly string[] {
  const repeat = spec.many === true ? '*' : '';
  const value = spec.value === undefined ? '' : `:${plain(spec.value)}:${action(spec)}`;
  const text = `[${plain(spec.description)}]${value}`;
  // "--option value" and "--option=value"; "-x value".
  const long = `${repeat}--${name}${spec.value === undefined ? '' : '='}${text}`;
  return spec.short === undefined ? [long] : [long, `${repeat}-${spec.short}${text}`];
}

function argumentSpec(argument: ArgumentSpec, index: number): string {
  const place = argument.many === true ? '*' : String(index + 1);
  const optional = argument.optional === true && argument.many !== true ? ':' : '';
  return `${place}:${optional}${plain(argument.label)}:${action(argument)}`;
}

function functionName(path: string): string {
  return path === '' ? '_b2' : `_b2_${path.replace(/[^a-z0-9]/g, '_')}`;
}

function placeFunction(place: Place): string {
  const options = [...place.options, ...globalOptions].flatMap(optionSpecs).map(shellQuote);
  const name = functionName(place.path);
  if (place.words.length === 0) {
    const args = place.arguments.map(argumentSpec).map(shellQuote);
    return `${name}() {
  _arguments -S -s \\
    ${[...options, ...args].join(' \\\n    ')}
}`;
  }
  const words = place.words.map(({ word, summary }) => shellQuote(`${word}:${plain(summary)}`));
  const cases = place.words.map(({ word }) => {
    const path = place.path === '' ? word : `${place.path} ${word}`;
    return `        ${word}) ${functionName(path)} ;;`;
  });
  return `${name}() {
  local curcontext=$curcontext state line ret=1
  typeset -A opt_args
  local -a words_here=(
    ${words.join('\n    ')}
  )
  _arguments -C -S -s \\
    ${options.join(' \\\n    ')} \\
    '1: :->word' \\
    '*:: :->rest' && ret=0
  case $state in
    word) _describe -t commands command words_here && ret=0 ;;
    rest)
      case $line[1] in
${cases.join('\n')}
      esac && ret=0
      ;;
  esac
  return ret
}`;
}

/** The script; as the file _b2 in $fpath, or sourced after compinit, it completes `b2`. */
export function zshCompletion(commands?: readonly CommandSpec[]): string {
  return `#compdef b2
# zsh completion for b2, made by "b2 completion zsh"

${places(commands).map(placeFunction).join('\n\n')}

if [[ $funcstack[1] == _b2 ]]; then
  _b2 "$@"
else
  compdef _b2 b2
fi`;
}
