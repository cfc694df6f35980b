/** Medians, spreads and ratios of the recorded rounds, as text and as Markdown. */
import { ALSO, BETTER_OF, GOALS, LIMITS, OPERATIONS, PARTS } from './tools.mjs';

const OURS = 'b2';
const MEASURES = { elapsedS: 'elapsed', cpuS: 'CPU' };

/** Median and range, or undefined of nothing. */
export function spread(values) {
  const sorted = values.filter((value) => Number.isFinite(value)).toSorted((a, b) => a - b);
  if (sorted.length === 0) return undefined;
  const middle = Math.floor(sorted.length / 2);
  const median =
    sorted.length % 2 === 1 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
  return { median, min: sorted[0], max: sorted.at(-1) };
}

const sum = (values) => values.reduce((a, b) => a + b, 0);

/** What C programs need for `operation` in this round; undefined unless every part was measured. */
export function limitOf(round, operation) {
  const { io, compute } = LIMITS[operation];
  const ioRuns = io.map((part) => round.parts[part]);
  const computeRuns = compute.map((part) => round.parts[part]);
  if ([...ioRuns, ...computeRuns].includes(undefined)) return undefined;
  return {
    elapsedS: sum(ioRuns.map((run) => run.elapsedS)),
    cpuS: sum(ioRuns.map((run) => run.cpuS)) + sum(computeRuns.map((run) => run.userS)),
  };
}

function denominator(round, { operation, measure, to }) {
  if (to === 'limit') return limitOf(round, operation)?.[measure];
  // A peer that failed or is missing does not count; without any there is no ratio.
  const peerOperation = operation === 'rollback' ? 'restore' : operation;
  const values = BETTER_OF.flatMap((tool) => round.runs[tool]?.[peerOperation]?.[measure] ?? []);
  return values.length === 0 ? undefined : Math.min(...values);
}

/** Each ratio within a round, then over the rounds. `met` is undefined without a goal or a measurement. */
export function compare(rounds) {
  return [...GOALS, ...ALSO].map((goal) => {
    const ratios = rounds.flatMap((round) => {
      const ours = round.runs[OURS]?.[goal.operation]?.[goal.measure];
      const theirs = denominator(round, goal);
      return ours === undefined || theirs === undefined || theirs === 0 ? [] : [ours / theirs];
    });
    const ratio = spread(ratios);
    const hasVerdict = goal.most !== undefined && ratio !== undefined;
    return { ...goal, ratio, met: hasVerdict ? ratio.median <= goal.most : undefined };
  });
}

const digits = (value) => (value < 10 ? 2 : value < 100 ? 1 : 0);

function show(figure, places) {
  if (figure === undefined) return '–';
  const { median, min, max } = figure;
  const at = places ?? digits(median);
  const text = (value) => value.toFixed(at);
  return min === max ? text(median) : `${text(median)} (${text(min)}–${text(max)})`;
}

function toolRows(data, operation) {
  const rows = [];
  for (const tool of data.tools) {
    const runs = data.rounds.flatMap((round) => round.runs[tool]?.[operation] ?? []);
    if (runs.length === 0) continue;
    const of = (key) => show(spread(runs.map((run) => run[key])));
    const stored = spread(runs.flatMap((run) => run.storedMiB ?? []));
    rows.push([tool, of('elapsedS'), of('cpuS'), of('maxRssMiB'), show(stored, 0)]);
  }
  if (LIMITS[operation] !== undefined) {
    const limits = data.rounds.flatMap((round) => limitOf(round, operation) ?? []);
    const of = (key) => show(spread(limits.map((limit) => limit[key])));
    if (limits.length > 0) rows.push(['limit (C, dd)', of('elapsedS'), of('cpuS'), '–', '–']);
  }
  return rows;
}

function partRows(data) {
  return [...Object.keys(PARTS), 'readTarget'].flatMap((part) => {
    const runs = data.rounds.flatMap((round) => round.parts[part] ?? []);
    const of = (key) => show(spread(runs.map((run) => run[key])));
    return runs.length === 0 ? [] : [[part, of('elapsedS'), of('userS'), of('sysS')]];
  });
}

const VERDICTS = new Map([
  [true, 'met'],
  [false, 'MISSED'],
  [undefined, '–'],
]);

function against({ operation, to }) {
  if (to === 'limit') return 'limit (C, dd)';
  return `better of restic and borg${operation === 'rollback' ? ' (whole restore)' : ''}`;
}

function ratioRows(data) {
  return compare(data.rounds).map(({ operation, measure, to, most, ratio, met }) => [
    OPERATIONS[operation],
    MEASURES[measure],
    against({ operation, to }),
    show(ratio, 2),
    most === undefined ? '–' : `≤ ${most}`,
    VERDICTS.get(met),
  ]);
}

const TOOL_HEAD = ['', 'elapsed s', 'CPU s', 'memory MiB', 'stored MiB'];
const PART_HEAD = ['part', 'elapsed s', 'user s', 'system s'];
const RATIO_HEAD = ['', 'of', 'against', 'ratio', 'goal', ''];

function sections(data) {
  const operations = Object.entries(OPERATIONS).map(([operation, title]) => ({
    title,
    head: TOOL_HEAD,
    rows: toolRows(data, operation),
  }));
  return [
    {
      title: 'ratios within each round (b2 with encryption)',
      head: RATIO_HEAD,
      rows: ratioRows(data),
    },
    ...operations,
    { title: 'parts of the limit', head: PART_HEAD, rows: partRows(data) },
  ].filter(({ rows }) => rows.length > 0);
}

function introduction({ machine, image, rounds, cold, startedAt, versions }) {
  const count = `${rounds.length} ${rounds.length === 1 ? 'round' : 'rounds'}`;
  return [
    `${startedAt}: ${machine.cpu}, ${machine.cores} cores, ${machine.memoryGiB} GiB, Linux ${machine.kernel}, ${machine.fileSystem}; load before ${machine.loadBefore}.`,
    `Image of ${image.sizeMiB} MiB (${image.diskMiB} on disk, ext4 with files of /usr), ${count}, page cache ${cold ? 'dropped before each run' : 'as it is'}. Median (least–most).`,
    `Versions: ${Object.entries(versions)
      .map(([name, version]) => `${name} ${version}`)
      .join(', ')}.`,
  ];
}

const problems = (data) => data.rounds.flatMap(({ failures }) => failures);

/** Columns of the terminal: none of the cells has characters of double width. */
function textTable(head, rows) {
  const widths = head.map((_, i) => Math.max(...[head, ...rows].map((row) => row[i].length)));
  return [head, ...rows]
    .map((row) =>
      row
        .map((cell, i) => cell.padEnd(widths[i]))
        .join('  ')
        .trimEnd(),
    )
    .join('\n');
}

export function asText(data) {
  return [
    introduction(data).join('\n'),
    ...sections(data).map(({ title, head, rows }) => `${title}\n${textTable(head, rows)}`),
    ...problems(data).map(
      ({ tool, operation, message }) => `FAILED ${tool} ${operation}: ${message}`,
    ),
  ].join('\n\n');
}

export function asMarkdown(data) {
  const row = (cells) => `| ${cells.join(' | ')} |`;
  return [
    ...introduction(data),
    ...sections(data).map(({ title, head, rows }) =>
      [`**${title}**\n`, row(head), row(head.map(() => '---')), ...rows.map(row)].join('\n'),
    ),
    ...problems(data).map(({ tool, operation }) => `**Failed: ${tool} ${operation}.**`),
  ].join('\n\n');
}
