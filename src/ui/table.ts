/** Tables for people: columns aligned by spaces, nothing to cut out when it is read by `awk`. */
import { printable } from '../human.js';
import type { Style } from './style.js';

export interface Column<R> {
  readonly title: string;
  readonly align?: 'left' | 'right';
  /** The cell's text without colour; control characters are made visible. */
  readonly cell: (row: R) => string;
  /** Colours the padded cell. */
  readonly paint?: (text: string, row: R, style: Style) => string;
}

/** Columns a terminal needs for `text`: wide and combining characters counted roughly as they show. */
export function displayWidth(text: string): number {
  let width = 0;
  for (const char of text) {
    if (/\p{Mark}/u.test(char)) continue;
    width +=
      /[\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60\uffe0-\uffe6]|\p{Emoji_Presentation}/u.test(
        char,
      )
        ? 2
        : 1;
  }
  return width;
}

function pad(text: string, width: number, align: 'left' | 'right'): string {
  const space = ' '.repeat(Math.max(0, width - displayWidth(text)));
  return align === 'right' ? space + text : text + space;
}

/**
 * A table with a bold head line; lines have no trailing spaces and there is no newline at the end.
 * No rows: just `empty`.
 */
export function table<R>(
  columns: readonly Column<R>[],
  rows: readonly R[],
  style: Style,
  empty: string,
): string {
  if (rows.length === 0) return empty;
  const cells = rows.map((row) => columns.map((column) => printable(column.cell(row))));
  const widths = columns.map((column, i) =>
    cells.reduce(
      (most, line) => Math.max(most, displayWidth(line[i] ?? '')),
      displayWidth(column.title),
    ),
  );
  const layOut = (line: readonly string[], row: R | undefined): string =>
    columns
      .map((column, i) => {
        const align = column.align ?? 'left';
        const last = i === columns.length - 1 && align === 'left';
        const text = last ? (line[i] ?? '') : pad(line[i] ?? '', widths[i] ?? 0, align);
        if (row === undefined) return style.bold(text);
        return column.paint === undefined ? text : column.paint(text, row, style);
      })
      .join('  ');
  const head = layOut(
    columns.map((column) => column.title),
    undefined,
  );
  return [head, ...cells.map((line, i) => layOut(line, rows[i]))].join('\n');
}

/** "label  value" lines with the labels aligned. */
export function fields(
  pairs: readonly (readonly [label: string, value: string])[],
  style: Style,
): string {
  const width = pairs.reduce((most, [label]) => Math.max(most, displayWidth(label)), 0);
  return pairs
    .map(([label, value]) => `${style.dim(pad(label, width, 'left'))}  ${printable(value)}`)
    .join('\n');
}
