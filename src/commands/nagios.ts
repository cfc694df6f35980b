/** Output of monitoring plugins: one line `B2 STATE - text | label=value[UOM];warn;crit`, and their exit codes. */
import { messageOf } from '../errors.js';
import { ExitCode } from '../errors.js';
import { printable } from '../human.js';
import type { Outcome } from './spec.js';

export type NagiosState = 'OK' | 'WARNING' | 'CRITICAL' | 'UNKNOWN';

/** The plugin codes have the numbers of other codes of ours. */
const CODES: Readonly<Record<NagiosState, ExitCode>> = {
  OK: ExitCode.ok,
  WARNING: ExitCode.failed,
  CRITICAL: ExitCode.usage,
  UNKNOWN: ExitCode.partial,
};

export interface NagiosValue {
  readonly label: string;
  readonly value: number;
  /** `s`, `B`, `%`, `c`; none for a count. */
  readonly unit?: 's' | 'B' | '%' | 'c';
  readonly warn?: number;
  readonly crit?: number;
}

export interface NagiosAnswer {
  readonly state: NagiosState;
  readonly line: string;
}

/** Text and labels may hold anything; `|`, `'` and `=` would end what they are in. */
export function nagios(
  state: NagiosState,
  text: string,
  values: readonly NagiosValue[],
): NagiosAnswer {
  const clean = printable(text).replaceAll('|', '/');
  const data = values.map((v) => {
    const label = printable(v.label).replace(/['=|]/g, '_');
    const quoted = label.includes(' ') ? `'${label}'` : label;
    return `${quoted}=${v.value}${v.unit ?? ''};${v.warn ?? ''};${v.crit ?? ''}`;
  });
  return {
    state,
    line: `B2 ${state} - ${clean}${data.length === 0 ? '' : ` | ${data.join(' ')}`}`,
  };
}

export function nagiosCode(state: NagiosState): ExitCode {
  return CODES[state];
}

/** Runs a check; whatever keeps it from an answer is UNKNOWN, which monitoring shows, and not an error that it may hide. */
export async function orUnknown<T>(
  isNagios: boolean,
  run: () => Promise<Outcome<T>>,
  wrap: (answer: NagiosAnswer) => T,
): Promise<Outcome<T>> {
  if (!isNagios) return run();
  try {
    return await run();
  } catch (error) {
    return { data: wrap(nagios('UNKNOWN', messageOf(error), [])), code: nagiosCode('UNKNOWN') };
  }
}
