/**
 * The part of YAML that `config` is written in, read without a YAML parser: loading one costs as much as reading the
 * whole of a small repository. It never guesses: what it does not know for certain it leaves to the real parser.
 */

/** `key: value` with an optional indent of a list (two columns, of which the first item line has a dash). */
const LINE = /^( {2}- | {4}|)([A-Za-z][A-Za-z0-9]*):(?: (.+))?$/;
/** Words that are strings, numbers, null or booleans, told apart below; nothing that has a meaning in YAML in it. */
const WORDS = /^[A-Za-z0-9+/](?:[A-Za-z0-9+/=_.:-]*[A-Za-z0-9+/=_.-])?(?: [A-Za-z0-9+/=_.-]+)*$/;
const QUOTED = /^"([\x20\x21\x23-\x5b\x5d-\x7e]*)"$/;
/** Integers that are exact as numbers and mean the same in every version of YAML. */
const INTEGER = /^(?:0|[1-9][0-9]{0,14})$/;
/** What the core schema of YAML 1.2 takes for something else than a string, and a little more. */
const NOT_A_STRING =
  /^(?:null|true|false|~|[-+]?[.0-9][0-9]*\.?[0-9]*(?:e[-+]?[0-9]+)?|0[xob][0-9a-f]+)$/i;

/** Undefined: not certain. */
function scalar(text: string): string | number | undefined {
  const quoted = QUOTED.exec(text)?.[1];
  if (quoted !== undefined) return quoted;
  if (!WORDS.test(text)) return undefined;
  if (INTEGER.test(text)) return Number(text);
  return NOT_A_STRING.test(text) ? undefined : text;
}

/**
 * The mapping in `text` if that is one of plain scalars and lists of such mappings, laid out as `config` is; undefined if it
 * is anything else, right or wrong. Where it has an answer, it is the one that YAML 1.2 (core schema) gives.
 */
export function parsePlainYaml(text: string): Record<string, unknown> | undefined {
  if (!text.endsWith('\n')) return undefined;
  const top: Record<string, unknown> = {};
  let list: Record<string, unknown>[] | undefined;
  for (const line of text.slice(0, -1).split('\n')) {
    const m = LINE.exec(line);
    if (m === null) return undefined;
    const [, indent = '', key = '', rest] = m;
    let into = top;
    if (indent !== '') {
      if (list === undefined) return undefined;
      if (indent === '  - ') list.push({});
      const item = list.at(-1);
      if (item === undefined) return undefined;
      into = item;
    } else if (list?.length === 0) {
      return undefined; // a key without a value is null, not a list
    }
    if (Object.hasOwn(into, key)) return undefined;
    if (rest === undefined) {
      if (into !== top) return undefined;
      list = [];
      into[key] = list;
      continue;
    }
    if (into === top) list = undefined;
    const value = scalar(rest);
    if (value === undefined) return undefined;
    into[key] = value;
  }
  return list?.length === 0 ? undefined : top;
}
