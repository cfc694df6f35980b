import { createHash } from 'node:crypto';

import { B2Error, ExitCode, isKind, messageOf } from '../../errors.js';
import type { EventSink } from '../../events.js';
import { groupNameOf } from '../../files/companions.js';
import { sameBlocks } from '../../files/diff-blocks.js';
import { compareTrees, withContent, type Aspect, type Change } from '../../files/diff.js';
import { findPointAreas } from '../../files/group-layout.js';
import { showName } from '../../files/names.js';
import type {
  BackendName,
  FileAccess,
  FileEntry,
  FoundFileSystem,
  Place,
} from '../../files/types.js';
import type { CommitRecord } from '../../format/segment.js';
import { formatCount, formatTimeLocal } from '../../human.js';
import type { Image } from '../../image.js';
import { choosePoint, openBlockMap, openImage, type ChosenPoint } from '../../repo/point.js';
import { BLOCK_BYTES, blocksOf } from '../../units.js';
import { parseWhen } from '../../when.js';
import type { Style } from '../../ui/style.js';
import type { DiffInput } from '../diff.js';
import type { CommandContext, Outcome } from '../spec.js';
import { entryRow, withFilesOf, type EntryRow } from './files-session.js';
import { localTime, pointRow, type PointRow } from './rows.js';
import { toldOnce, withVolumePath, type VolumePath } from './volume-path.js';

/** A change in `--json` output. */
export interface ChangeRow {
  readonly change: Change['change'];
  readonly fileSystem: string;
  readonly path: string;
  /** Of what was renamed. */
  readonly from?: string;
  readonly aspects: readonly Aspect[];
  readonly before?: EntryRow;
  readonly after?: EntryRow;
}

/** A file system in `--json` output: how it was compared. */
export interface ComparedRow {
  readonly name: string;
  readonly type: string;
  /** `blocks`: no block of it changed, so it was not looked into. `failed`: see the warning. */
  readonly compared: 'blocks' | 'files' | 'failed';
  /** Entries without a change. */
  readonly same: number;
  /** Files of the same size whose content may have changed, and was not compared. */
  readonly notCompared: number;
}

export interface DiffAnswer {
  readonly volume: string;
  readonly volumeId: string;
  readonly from: PointRow;
  readonly to: PointRow;
  readonly path?: string;
  /** Not a byte of the volume changed, and nothing in it lies on other volumes, too. */
  readonly identical: boolean;
  readonly fileSystems: readonly ComparedRow[];
  /** By file system and path. */
  readonly changes: readonly ChangeRow[];
  readonly backends: readonly string[];
}

interface Session extends VolumePath {
  readonly context: CommandContext;
  readonly events: EventSink;
  readonly backend: BackendName | 'auto';
  readonly used: Set<BackendName>;
}

/** Opens the files of a point, and notes which backend was used. */
function withPoint<T>(
  session: Session,
  commit: CommitRecord,
  fn: (access: FileAccess) => Promise<T>,
): Promise<T> {
  return withFilesOf(session.context, session, commit, session, async (access) => {
    try {
      return await fn(access);
    } finally {
      for (const name of access.used) session.used.add(name);
    }
  });
}

/** What is at the path and below; undefined where nothing is. */
async function treeOf(
  access: FileAccess,
  place: Place,
): Promise<Map<string, FileEntry> | undefined> {
  const tree = new Map<string, FileEntry>();
  try {
    const top = await access.stat(place, false);
    tree.set(top.path, top);
    for await (const entry of access.list({ ...place, path: top.path }, true))
      tree.set(entry.path, entry);
  } catch (error) {
    if (isKind(error, 'not-found')) return undefined;
    throw error;
  }
  return tree;
}

async function sha256Of(access: FileAccess, place: Place): Promise<string> {
  const hash = createHash('sha256');
  for await (const bytes of access.read(place)) hash.update(bytes);
  return hash.digest('hex');
}

async function hashes(
  access: FileAccess,
  fileSystem: FoundFileSystem,
  paths: readonly string[],
): Promise<readonly string[]> {
  const all: string[] = [];
  for (const path of paths) all.push(await sha256Of(access, { fileSystem, path }));
  return all;
}

interface Pair {
  readonly name: string;
  readonly path: string;
  readonly old: FoundFileSystem | undefined;
  readonly young: FoundFileSystem | undefined;
  /** Why it may be there at the point at which it was not found. */
  readonly doubt: string | undefined;
}

/** The file systems to compare: that which the path names, or all. */
async function pairsOf(
  session: Session,
  a: CommitRecord,
  b: CommitRecord,
): Promise<readonly Pair[]> {
  const { path = '' } = session;
  const placesAt = (
    commit: CommitRecord,
  ): Promise<{ readonly places: readonly Place[]; readonly doubt: string | undefined }> =>
    withPoint(session, commit, async (access) => {
      const doubt =
        access.notShown.length === 0
          ? undefined
          : `at #${commit.seq}: ${access.notShown.join('; ')}`;
      try {
        const place = await access.place(path);
        if (place !== undefined) return { places: [place], doubt };
        await access.openContainers();
        const places = access.fileSystems.map((fileSystem) => ({ fileSystem, path: '/' }));
        return { places, doubt };
      } catch (error) {
        if (isKind(error, 'not-found')) return { places: [], doubt };
        throw error;
      }
    });
  const [{ places: old, doubt: before }, { places: young, doubt: after }] = [
    await placesAt(a),
    await placesAt(b),
  ];
  if (old.length === 0 && young.length === 0) {
    throw new B2Error(
      'not-found',
      `no file system of ${session.volume.name} is meant by "${showName(path)}" at either point`,
      {
        hint:
          before === undefined && after === undefined
            ? '"b2 ls VOLUME" lists them.'
            : `Not shown ${[before, after].filter((d) => d !== undefined).join('; ')}.`,
      },
    );
  }
  const keyOf = (p: Place): string => `${p.fileSystem.name}\0${p.path}`;
  const keys = new Set([...old, ...young].map(keyOf));
  return [...keys].map((key) => {
    const [x, y] = [old.find((p) => keyOf(p) === key), young.find((p) => keyOf(p) === key)];
    const [name = '', at = '/'] = key.split('\0');
    const doubt = x === undefined ? before : y === undefined ? after : undefined;
    return { name, path: at, old: x?.fileSystem, young: y?.fileSystem, doubt };
  });
}

interface Compared {
  readonly row: ComparedRow;
  readonly changes: readonly Change[];
  /** Whether the path was there at one of both points at least. */
  readonly isThere: boolean;
}

async function compare(
  session: Session,
  [a, b]: readonly [CommitRecord, CommitRecord],
  pair: Pair,
  content: boolean,
): Promise<Compared> {
  const { history } = session;
  const { name, old, young, path, doubt } = pair;
  if (doubt !== undefined)
    throw new B2Error('io', `${name} cannot be compared, because it is not shown ${doubt}`, {
      hint: '"b2 points" shows which points are of one instant with those of the other volumes.',
    });
  const row = { name, type: (young ?? old)?.type ?? '', same: 0, notCompared: 0 };
  if (old !== undefined && young !== undefined && isSameArea(old, young)) {
    const from = Math.floor(young.offsetBytes / BLOCK_BYTES);
    const to = blocksOf(young.offsetBytes + young.sizeBytes);
    const maps = [await openBlockMap(history, a.seq), await openBlockMap(history, b.seq)] as const;
    if (await sameBlocks(maps[0], maps[1], from, to)) {
      return { row: { ...row, compared: 'blocks' }, changes: [], isThere: true };
    }
  }
  const before =
    old === undefined
      ? undefined
      : await withPoint(session, a, async (access) => {
          const place = await sameFileSystem(access, old, path);
          return treeOf(access, place);
        });
  const differences = await (young === undefined
    ? compareTrees(before ?? new Map<string, FileEntry>(), []).then((d) => ({
        d,
        after: false,
        sums: [],
      }))
    : withPoint(session, b, async (access) => {
        const place = await sameFileSystem(access, young, path);
        const after = await treeOf(access, place);
        const d = await compareTrees(before ?? new Map<string, FileEntry>(), after?.values() ?? []);
        const paths = content ? d.suspects.map((s) => s.after.path) : [];
        return {
          d,
          after: after !== undefined,
          sums: await hashes(access, place.fileSystem, paths),
        };
      }));
  const { d, sums } = differences;
  let changes = d.changes;
  if (old !== undefined && sums.length > 0) {
    const earlier = await withPoint(session, a, async (access) => {
      const place = await sameFileSystem(access, old, path);
      return hashes(
        access,
        place.fileSystem,
        d.suspects.map((s) => s.before.path),
      );
    });
    const differs = d.suspects.filter((_, i) => sums[i] !== earlier[i]).map((s) => s.after.path);
    changes = withContent(d, new Set(differs));
  }
  const notCompared = content ? 0 : d.suspects.length;
  return {
    row: { ...row, compared: 'files', same: d.same, notCompared },
    changes,
    isThere: before !== undefined || differences.after,
  };
}

/** Whether something in the volume lies on other volumes of its group, too. */
async function liesOnOthers(
  { volume, history }: VolumePath,
  { seq }: CommitRecord,
): Promise<boolean> {
  if (groupNameOf(volume) === undefined) return false;
  const openIt = (): Promise<Image> => openImage(history, volume, seq);
  return (await findPointAreas({ openImage: openIt, name: volume.name })).isSpread;
}

function isSameArea(x: FoundFileSystem, y: FoundFileSystem): boolean {
  return x.sizeBytes > 0 && x.offsetBytes === y.offsetBytes && x.sizeBytes === y.sizeBytes;
}

/** The place in a file system that was found when the image was open before. */
async function sameFileSystem(
  access: FileAccess,
  { name, sizeBytes }: FoundFileSystem,
  path: string,
): Promise<Place> {
  if (sizeBytes === 0) await access.openContainers();
  const fileSystem = access.fileSystems.find((f) => f.name === name);
  if (fileSystem === undefined) throw new B2Error('io', `the file system ${name} is gone`);
  return { fileSystem, path };
}

export function run(context: CommandContext, input: DiffInput): Promise<Outcome<DiffAnswer>> {
  return withVolumePath(context, input.arguments.place, async (opened) => {
    const { volume, history, path } = opened;
    const { options } = input;
    const events = toldOnce(context.events);
    const point = (text: string): Promise<ChosenPoint> =>
      choosePoint(history, volume, parseWhen(text, context.clock.nowNs()), (message) =>
        events({ type: 'warning', message }),
      );
    if (options.from === undefined)
      throw new B2Error('usage', '--from is missing', { hint: 'b2 diff VOLUME --from T [--to T]' });
    const [a, b] = [await point(options.from), await point(options.to)];
    for (const [word, { commit, snapshot }] of [
      ['from', a],
      ['to', b],
    ] as const) {
      const name = snapshot === undefined ? '' : ` (snapshot ${snapshot.name})`;
      events({
        type: 'note',
        message: `${word} point #${commit.seq} of ${volume.name}, ${formatTimeLocal(commit.instantNs)}${name}`,
      });
    }
    const row = ({ commit, snapshot }: ChosenPoint): PointRow =>
      pointRow(commit, snapshot === undefined ? [] : [snapshot.name]);
    const common = {
      volume: volume.name,
      volumeId: volume.id,
      from: row(a),
      to: row(b),
      ...(path === undefined ? {} : { path }),
    };
    const isIdentical = await sameBlocks(
      await openBlockMap(history, a.commit.seq),
      await openBlockMap(history, b.commit.seq),
    );
    if (isIdentical && !(await liesOnOthers(opened, b.commit)))
      return { data: { ...common, identical: true, fileSystems: [], changes: [], backends: [] } };
    const used = new Set<BackendName>();
    const session: Session = { ...opened, context, events, backend: options.backend, used };
    const pairs = await pairsOf(session, a.commit, b.commit);
    const rows: ComparedRow[] = [];
    const changes: ChangeRow[] = [];
    let isThere = false;
    for (const pair of pairs) {
      try {
        const done = await compare(session, [a.commit, b.commit], pair, options.content);
        rows.push(done.row);
        changes.push(...done.changes.map((c) => changeRow(pair.name, c)));
        isThere ||= done.isThere;
      } catch (error) {
        // One of several: the others are compared all the same.
        if (pairs.length === 1 || !isKind(error, 'unsupported', 'io', 'damaged')) throw error;
        const type = (pair.young ?? pair.old)?.type ?? '';
        rows.push({ name: pair.name, type, compared: 'failed', same: 0, notCompared: 0 });
        events({
          type: 'warning',
          message: `${pair.name} (${type}) cannot be compared: ${messageOf(error)}`,
        });
        isThere = true;
      }
    }
    if (!isThere) {
      throw new B2Error(
        'not-found',
        `${showName(path ?? '/')} is in ${volume.name} at neither of the two points`,
        { hint: '"b2 ls" shows what is there.' },
      );
    }
    return {
      data: { ...common, identical: false, fileSystems: rows, changes, backends: [...used] },
      ...(rows.some((r) => r.compared === 'failed') ? { code: ExitCode.partial } : {}),
    };
  });
}

function changeRow(fileSystem: string, c: Change): ChangeRow {
  return {
    change: c.change,
    fileSystem,
    path: c.path,
    ...(c.from === undefined ? {} : { from: c.from }),
    aspects: c.aspects,
    ...(c.before === undefined ? {} : { before: entryRow(c.before) }),
    ...(c.after === undefined ? {} : { after: entryRow(c.after) }),
  };
}

const LETTERS: Readonly<Record<Change['change'], string>> = {
  added: '+',
  removed: '-',
  changed: 'M',
  renamed: 'R',
};

export function text(data: DiffAnswer, style: Style): string {
  const between = `${data.volume} between ${data.from.id} (${localTime(data.from.time)}) and ${data.to.id} (${localTime(data.to.time)})`;
  if (data.identical) return `Nothing changed in ${between}: every block is the same.`;
  const isOne = data.fileSystems.length === 1;
  const lines = data.changes.map((c) => {
    const shown = (path: string): string => showName(isOne ? path : `${c.fileSystem}:${path}`);
    const name = c.from === undefined ? shown(c.path) : `${shown(c.from)} -> ${shown(c.path)}`;
    const line = `${LETTERS[c.change]} ${name}${c.aspects.length === 0 ? '' : `  (${c.aspects.join(', ')})`}`;
    if (c.change === 'added') return style.green(line);
    return c.change === 'removed' ? style.red(line) : line;
  });
  const count = (change: Change['change']): string =>
    formatCount(data.changes.filter((c) => c.change === change).length);
  lines.push(
    `${between}: ${count('added')} added, ${count('removed')} removed, ${count('changed')} changed, ${count('renamed')} renamed.`,
  );
  const unread = data.fileSystems.reduce((n, f) => n + f.notCompared, 0);
  if (unread > 0)
    lines.push(
      `The content of ${formatCount(unread)} files of the same size but with another inode or other times was not compared (--content).`,
    );
  return lines.join('\n');
}
