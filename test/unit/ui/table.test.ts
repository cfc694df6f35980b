import { expect, it } from 'vitest';
import { plainStyle, styleFor, wantsColour, type Style } from '../../../src/ui/style.js';
import { displayWidth, fields, table, type Column } from '../../../src/ui/table.js';

interface Row {
  readonly name: string;
  readonly size: string;
}
const columns: readonly Column<Row>[] = [
  { title: 'NAME', cell: (row) => row.name },
  { title: 'SIZE', align: 'right', cell: (row) => row.size },
  { title: 'NOTE', cell: () => 'x' },
];

it('aligns columns without trailing spaces', () => {
  const rows = [
    { name: 'a', size: '1 B' },
    { name: 'long name', size: '1023 B' },
  ];
  expect(table(columns, rows, plainStyle, 'none')).toBe(
    ['NAME         SIZE  NOTE', 'a             1 B  x', 'long name  1023 B  x'].join('\n'),
  );
  expect(table(columns, [], plainStyle, 'none yet')).toBe('none yet');
});

it('counts wide characters as two and shows control characters', () => {
  expect(displayWidth('日本e\u0301')).toBe(5);
  const rows = [
    { name: '日本', size: '1' },
    { name: 'a\u001b[2J', size: '2' },
  ];
  expect(table(columns, rows, plainStyle, '').split('\n')).toEqual([
    'NAME      SIZE  NOTE',
    '日本         1  x',
    'a\\x1b[2J     2  x',
  ]);
});

it('paints cells after they were aligned', () => {
  const style: Style = { ...plainStyle, red: (text) => `<${text}>` };
  const painted: readonly Column<Row>[] = [
    {
      title: 'N',
      cell: (row) => row.name,
      paint: (text, row, s) => (row.size === '1' ? s.red(text) : text),
    },
    { title: 'S', cell: (row) => row.size },
  ];
  const rows = [
    { name: 'ab', size: '1' },
    { name: 'c', size: '2' },
  ];
  expect(table(painted, rows, style, '').split('\n').slice(1)).toEqual(['<ab>  1', 'c   2']);
});

it('lists fields', () => {
  expect(
    fields(
      [
        ['id', '1'],
        ['label', 'b\n'],
      ],
      plainStyle,
    ),
  ).toBe('id     1\nlabel  b\\x0a');
});

it('colours only for somebody who wants to see them', async () => {
  const tty = { isTty: true, json: false, env: {} };
  expect(wantsColour(tty)).toBe(true);
  expect(wantsColour({ ...tty, env: { NO_COLOR: '' } })).toBe(true);
  expect(wantsColour({ ...tty, env: { NO_COLOR: '1' } })).toBe(false);
  expect(wantsColour({ ...tty, env: { TERM: 'dumb' } })).toBe(false);
  expect(wantsColour({ ...tty, json: true })).toBe(false);
  expect(wantsColour({ ...tty, isTty: false })).toBe(false);
  expect((await styleFor(tty)).red('x')).toBe('\u001b[31mx\u001b[39m');
  expect((await styleFor({ ...tty, isTty: false })).red('x')).toBe('x');
});
