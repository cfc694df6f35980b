import { B2Error } from '../../errors.js';
import type { TapeCartridge, TapePoint } from '../../format/tape.js';
import { formatBytes, formatTimeNs } from '../../human.js';
import type { Repository } from '../../repo/repository.js';
import { findSnapshot, findVolume, type VolumeMeta } from '../../repo/volume.js';
import { listCartridges } from '../../tape/catalogue.js';
import { table } from '../../ui/table.js';
import type { Style } from '../../ui/style.js';
import { parseWhen, type When } from '../../when.js';
import type { CommandContext, Outcome } from '../spec.js';
import type { TapeListInput } from '../tape-list.js';
import { localTime } from './rows.js';
import { volumesOf, withRepository } from './session.js';

export interface CartridgeRow {
  readonly label: string;
  readonly set: string;
  readonly number: number;
  readonly barcode: string;
  readonly created: string;
  /** End of the last export to it; empty: none was finished. */
  readonly written: string;
  readonly bytes: number;
  readonly full: boolean;
  readonly sessions: number;
  /** When all of it was last read back and found right; absent: not since the last export. */
  readonly verified?: string;
  readonly damagedPacks: number;
  readonly points: readonly {
    readonly volume: string;
    readonly id: string;
    readonly time: string;
    readonly class: string;
    /** False: the export that it belongs to was not finished. */
    readonly complete: boolean;
  }[];
}

export interface TapeListAnswer {
  readonly cartridges: readonly CartridgeRow[];
  /** With `--needs`. */
  readonly needed?: { readonly volume: string; readonly id: string; readonly time: string };
}

export function run(
  context: CommandContext,
  input: TapeListInput,
): Promise<Outcome<TapeListAnswer>> {
  const { options } = input;
  if (options.at !== 'latest' && options.needs === undefined)
    throw new B2Error('usage', '--at is for --needs, and without has no effect', {
      hint: 'b2 tape list --needs VOLUME --at TIME names the cartridges of that point.',
    });
  return withRepository(context, async (repo) => {
    const warn = (message: string): void => context.events({ type: 'warning', message });
    const all = (await listCartridges(repo, warn)).filter(
      (c) => options.label === undefined || c.tape.setName === options.label,
    );
    const finished = finishedSessions(all);
    if (options.needs === undefined)
      return { data: { cartridges: all.map((c) => rowOf(c, finished)) } };
    return { data: await needed(context, input, repo, all, finished, options.needs) };
  });
}

function finishedSessions(all: readonly TapeCartridge[]): ReadonlySet<string> {
  return new Set(all.flatMap((c) => c.sessions.filter((s) => s.last).map((s) => s.id)));
}

async function needed(
  context: CommandContext,
  input: TapeListInput,
  repo: Repository,
  all: readonly TapeCartridge[],
  finished: ReadonlySet<string>,
  name: string,
): Promise<TapeListAnswer> {
  const volume = findVolume(await volumesOf(context, repo), name);
  const when = await whenOf(context, repo, volume, input.options.at);
  const candidates: { readonly point: TapePoint; readonly session: string }[] = all
    .flatMap((c) => c.sessions)
    .filter((s) => finished.has(s.id))
    .flatMap((s) => s.points.map((point) => ({ point, session: s.id })))
    .filter(({ point }) => point.volumeId === volume.id)
    .filter(({ point }) => {
      if (when.kind === 'instant') return point.instantNs <= when.ns;
      if (when.kind === 'point') return point.seq === when.seq;
      return when.kind === 'latest';
    });
  // Of several exports of one point the last, whose cartridges are the youngest.
  const chosen = candidates.reduce<(typeof candidates)[number] | undefined>(
    (best, c) => (best === undefined || c.point.seq >= best.point.seq ? c : best),
    undefined,
  );
  if (chosen === undefined)
    throw new B2Error('not-found', `no point of ${volume.name} at that time is on tape`, {
      hint: '"b2 tape list" shows what is; "b2 export-tape" writes one.',
    });
  const labels = new Set(chosen.point.needs);
  const rows = all.filter(
    (c) => labels.has(c.tape.label) || c.sessions.some((s) => s.id === chosen.session),
  );
  return {
    cartridges: rows.map((c) => rowOf(c, finished)),
    needed: {
      volume: volume.name,
      id: `#${chosen.point.seq}`,
      time: formatTimeNs(chosen.point.instantNs),
    },
  };
}

/** A snapshot is looked for by its point; one whose name reads as a time is meant by that name, as everywhere. */
async function whenOf(
  context: CommandContext,
  repo: Repository,
  volume: VolumeMeta,
  text: string,
): Promise<When> {
  const when = parseWhen(text, context.clock.nowNs());
  const name = when.kind === 'name' ? when.name : when.kind === 'instant' ? when.text : undefined;
  if (name === undefined) return when;
  const snapshot = await findSnapshot(repo, volume.id, name);
  if (snapshot !== undefined) return { kind: 'point', seq: snapshot.seq };
  if (when.kind === 'name')
    throw new B2Error(
      'not-found',
      `"${name}" is neither a time nor a snapshot of volume ${volume.name}`,
      { hint: '"b2 snapshots" lists the names, "b2 tape list" the points on tape.' },
    );
  return when;
}

function rowOf(c: TapeCartridge, finished: ReadonlySet<string>): CartridgeRow {
  const last = c.sessions.at(-1);
  const checked = c.sessions.every((s) => s.verifiedNs > 0n);
  const oldest = c.sessions.reduce(
    (ns, s) => (s.verifiedNs < ns ? s.verifiedNs : ns),
    last?.verifiedNs ?? 0n,
  );
  return {
    label: c.tape.label,
    set: c.tape.setName,
    number: c.tape.number,
    barcode: c.barcode,
    created: c.tape.created,
    written: last === undefined ? '' : formatTimeNs(last.finishedNs),
    bytes: c.sessions.reduce((sum, s) => sum + s.bytes, 0),
    full: c.full,
    sessions: c.sessions.length,
    ...(checked && oldest > 0n ? { verified: formatTimeNs(oldest) } : {}),
    damagedPacks: c.sessions.reduce((sum, s) => sum + s.damagedPacks.length, 0),
    points: c.sessions.flatMap((s) =>
      s.points.map((p) => ({
        volume: p.volumeName,
        id: `#${p.seq}`,
        time: formatTimeNs(p.instantNs),
        class: p.pointClass,
        complete: finished.has(s.id),
      })),
    ),
  };
}

export function text(data: TapeListAnswer, style: Style): string {
  const list = table<CartridgeRow>(
    [
      { title: 'LABEL', cell: (c) => c.label },
      { title: 'SET', cell: (c) => c.set },
      { title: 'BAR CODE', cell: (c) => c.barcode },
      { title: 'WRITTEN', cell: (c) => (c.written === '' ? 'nothing yet' : localTime(c.written)) },
      { title: 'SIZE', align: 'right', cell: (c) => formatBytes(c.bytes) },
      { title: 'FULL', cell: (c) => (c.full ? 'full' : '') },
      {
        title: 'VERIFIED',
        cell: (c) =>
          c.damagedPacks > 0
            ? `${c.damagedPacks} packs damaged`
            : c.verified === undefined
              ? 'no'
              : localTime(c.verified),
        paint: (t, c) => (c.damagedPacks > 0 ? style.red(t) : t),
      },
      { title: 'POINTS', cell: (c) => pointsText(c) },
    ],
    data.cartridges,
    style,
    'no cartridges',
  );
  if (data.needed === undefined) return list;
  return `${data.needed.volume} ${data.needed.id}, ${localTime(data.needed.time)} needs:\n${list}`;
}

const POINTS_SHOWN = 3;

function pointsText(c: CartridgeRow): string {
  const shown = c.points
    .slice(-POINTS_SHOWN)
    .map((p) => `${p.volume} ${p.id}${p.complete ? '' : ' (not finished)'}`);
  const more = c.points.length - shown.length;
  return `${shown.join(', ')}${more > 0 ? ` and ${more} more` : ''}`;
}
