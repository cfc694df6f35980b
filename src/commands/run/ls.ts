import { showName } from '../../files/names.js';
import type { EntryKind } from '../../files/types.js';
import { formatBytes } from '../../human.js';
import type { Style } from '../../ui/style.js';
import { table, type Column } from '../../ui/table.js';
import type { LsInput } from '../ls.js';
import type { CommandContext, Outcome } from '../spec.js';
import {
  entryRow,
  fileSystemRow,
  withFiles,
  type EntryRow,
  type FileSystemRow,
} from './files-session.js';
import { localTime, pointRow, type PointRow } from './rows.js';

/** The answer: of a volume with several file systems and without a path, `fileSystems`; else `entries`. */
export interface LsAnswer {
  readonly volume: string;
  readonly volumeId: string;
  readonly point: PointRow;
  readonly fileSystems: readonly FileSystemRow[];
  /** Which one the entries are of. */
  readonly fileSystem?: string;
  readonly path?: string;
  readonly entries?: readonly EntryRow[];
  /** Who read: `kernel`, `vm`. */
  readonly backends: readonly string[];
  readonly isLong: boolean;
}

export function run(context: CommandContext, input: LsInput): Promise<Outcome<LsAnswer>> {
  const { options } = input;
  return withFiles(context, input.arguments.place, options, async (files) => {
    const { access, volume, commit, snapshot } = files;
    const place = await access.place(files.path ?? '');
    const common = {
      volume: volume.name,
      volumeId: volume.id,
      point: pointRow(commit, snapshot === undefined ? [] : [snapshot.name]),
      fileSystems: access.fileSystems.map(fileSystemRow),
      isLong: options.long,
    };
    if (place === undefined) return { data: { ...common, backends: access.used } };
    // As ls does it: a link to a directory shows the directory, unless the link itself is wanted.
    const itself = await access.stat(place, false);
    const shown =
      itself.kind === 'symlink' && !options.long
        ? await access.stat(place, true).catch(() => itself)
        : itself;
    const entries: EntryRow[] = [];
    for await (const entry of access.list(
      { fileSystem: place.fileSystem, path: shown.path },
      options.recursive,
    ))
      entries.push(entryRow(entry));
    entries.sort((a, b) => (a.path < b.path ? -1 : a.path > b.path ? 1 : 0));
    return {
      data: {
        ...common,
        fileSystem: place.fileSystem.name,
        path: shown.path,
        entries,
        backends: access.used,
      },
    };
  });
}

const FILE_SYSTEM_COLUMNS: readonly Column<FileSystemRow>[] = [
  { title: 'NAME', cell: (f) => f.name },
  { title: 'TYPE', cell: (f) => f.type },
  {
    title: 'SIZE',
    align: 'right',
    cell: (f) => (f.sizeBytes === undefined ? '' : formatBytes(f.sizeBytes)),
  },
  { title: 'LABEL', cell: (f) => f.label ?? '' },
  { title: 'UUID', cell: (f) => f.uuid ?? '' },
];

const LETTERS: Readonly<Record<EntryKind, string>> = {
  file: '-',
  directory: 'd',
  symlink: 'l',
  fifo: 'p',
  socket: 's',
  block: 'b',
  character: 'c',
  unknown: '?',
};

/** `drwxr-sr-x`, as ls writes it. */
export function modeText(kind: string, mode: string): string {
  const bits = parseInt(mode, 8);
  const letter = Object.entries(LETTERS).find(([name]) => name === kind)?.[1] ?? '?';
  const three = (shift: number, special: boolean, set: string): string => {
    const x = (bits >> shift) & 1;
    const last = special ? (x === 1 ? set : set.toUpperCase()) : x === 1 ? 'x' : '-';
    return `${(bits >> (shift + 2)) & 1 ? 'r' : '-'}${(bits >> (shift + 1)) & 1 ? 'w' : '-'}${last}`;
  };
  const special = (bit: number): boolean => (bits & bit) !== 0;
  return `${letter}${three(6, special(0o4000), 's')}${three(3, special(0o2000), 's')}${three(0, special(0o1000), 't')}`;
}

export function text(data: LsAnswer, style: Style): string {
  const { entries, path = '/' } = data;
  if (entries === undefined)
    return table(FILE_SYSTEM_COLUMNS, data.fileSystems, style, 'no file systems');
  const below = path === '/' ? path : `${path}/`;
  const name = (e: EntryRow): string => {
    const own = e.path.startsWith(below) ? e.path.slice(below.length) : e.path;
    const target = data.isLong && e.target !== undefined ? ` -> ${e.target}` : '';
    return showName(`${own}${target}`);
  };
  if (!data.isLong) return entries.map(name).join('\n');
  const columns: readonly Column<EntryRow>[] = [
    { title: 'MODE', cell: (e) => modeText(e.kind, e.mode) },
    { title: 'LINKS', align: 'right', cell: (e) => String(e.links) },
    { title: 'UID', align: 'right', cell: (e) => String(e.uid) },
    { title: 'GID', align: 'right', cell: (e) => String(e.gid) },
    { title: 'SIZE', align: 'right', cell: (e) => String(e.sizeBytes) },
    { title: 'MODIFIED', cell: (e) => localTime(e.mtime) },
    { title: 'NAME', cell: name },
  ];
  return table(columns, entries, style, '');
}
