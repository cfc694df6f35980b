/** Reads a whole cartridge and says what on it is not right, and which points that touches. */
import type { Clock } from '../clock.js';
import type { TapeDrive } from '../devices/tape/drive.js';
import { isKind } from '../errors.js';
import type { EventSink } from '../events.js';
import { packName } from '../format/names.js';
import type { TapeLabel } from '../format/tape.js';
import { startProgress } from '../progress.js';
import { readCommits, type ReadCommit } from '../repo/commits.js';
import { toFile } from './cartridge.js';
import { SetKnowledge, type TapeView } from './import.js';
import { FOOTER_NUMBER } from './pack-work.js';
import { DEFAULT_TAPE_WORKERS, PackPool } from './pool.js';
import { readBack, type PackMet } from './read-back.js';
import type { TapeDamage } from './reader.js';

/** Something that is not right on a cartridge. */
export interface TapeFinding {
  /** `record`: part of the tape cannot be read; `pack`: a pack is damaged; `missing`: a pack that should be there is not. */
  readonly kind: 'record' | 'pack' | 'missing';
  readonly file?: number;
  readonly record?: number;
  readonly packId?: string;
  readonly frames?: readonly number[];
  readonly message: string;
  /** `volume #seq` of the points that need it; empty: none, or there is another copy. */
  readonly points: readonly string[];
}

export interface TapeVerifyResult {
  readonly label: TapeLabel;
  readonly files: number;
  readonly packs: number;
  readonly chunks: number;
  readonly bytes: number;
  /** Points of which this cartridge holds the directory. */
  readonly points: number;
  readonly findings: readonly TapeFinding[];
  /** Packs of which this cartridge has no whole copy although it should. */
  readonly damagedPacks: readonly string[];
  /** True if it could be known what should be there. */
  readonly complete: boolean;
  readonly elapsedSeconds: number;
}

export interface TapeVerifyOptions {
  readonly drive: TapeDrive;
  readonly view: TapeView;
  readonly workers?: number | undefined;
  readonly clock: Clock;
  readonly events: EventSink;
  readonly signal?: AbortSignal | undefined;
}

/** Verifies the cartridge in the drive. Damage is told, not thrown. */
export async function verifyTape(options: TapeVerifyOptions): Promise<TapeVerifyResult> {
  const { drive, view, clock, events, signal } = options;
  const { label, repo } = view;
  const startNs = clock.monotonicNs();
  const knowledge = new SetKnowledge();
  knowledge.learn(view.survey.objects, repo);
  const progress = startProgress({
    phase: `verifying ${label.label} in ${drive.path}`,
    totalBytes: view.survey.record?.sessions.reduce((sum, s) => sum + s.bytes, 0),
    clock,
    events,
  });
  const found = await PackPool.with(
    {
      handle: repo.handle(undefined),
      store: repo.store,
      workers: options.workers ?? DEFAULT_TAPE_WORKERS,
      signal,
      what: `the verification of ${label.label}`,
    },
    async (pool) => {
      await toFile(drive, 0);
      return readBack({
        drive,
        recordBytes: label.recordBytes,
        fromFile: 0,
        pool,
        progress,
        signal,
      });
    },
  );
  progress.finish();
  knowledge.learn(found.objects, repo);
  const users = await pointsByPack(view);
  const good = new Set(found.packs.filter(isWhole).map((p) => p.packId));
  const findings: TapeFinding[] = found.damage.map((d: TapeDamage) => ({
    kind: 'record',
    file: d.file,
    record: d.record,
    message: d.reason,
    points: [],
  }));
  const bad = new Set<string>();
  for (const p of found.packs) {
    if (isWhole(p)) continue;
    if (!good.has(p.packId)) bad.add(p.packId);
    findings.push({
      kind: 'pack',
      file: p.file,
      record: p.record,
      packId: p.packId,
      frames: p.damaged.map((d) => d.frame).filter((frame) => frame !== FOOTER_NUMBER),
      message: `${p.damaged[0]?.reason ?? ''}${
        p.damaged.length > 1 ? ` and ${p.damaged.length - 1} more` : ''
      }${good.has(p.packId) ? '; there is a whole copy on this cartridge' : ''}`,
      points: good.has(p.packId) ? [] : (users.get(p.packId) ?? []),
    });
  }
  const met = new Set(found.packs.map((p) => p.packId));
  for (const [packId, places] of knowledge.packs) {
    const at = places.find((place) => place.label === label.label);
    if (at === undefined || met.has(packId)) continue;
    bad.add(packId);
    findings.push({
      kind: 'missing',
      file: at.file,
      packId,
      message: `${packName(packId)} should be in file ${at.file} and was not found`,
      points: users.get(packId) ?? [],
    });
  }
  return {
    label,
    files: found.files.length,
    packs: good.size,
    chunks: found.packs.reduce((sum, p) => sum + p.chunks, 0),
    bytes: found.bytes,
    points: new Set([...users.values()].flat()).size,
    findings,
    damagedPacks: [...bad],
    complete: view.survey.record !== undefined,
    elapsedSeconds: Number(clock.monotonicNs() - startNs) / 1e9,
  };
}

function isWhole(p: PackMet): boolean {
  return p.damaged.length === 0;
}

/** Which points of the directories need which packs. */
async function pointsByPack(view: TapeView): Promise<Map<string, string[]>> {
  const { repo, survey } = view;
  const users = new Map<string, string[]>();
  const names = new Map<string, string>();
  for (const c of survey.record?.sessions ?? [])
    for (const p of c.points) names.set(p.volumeId, p.volumeName);
  const onTape = [...survey.packs.keys()].map((name) => name.split('/').at(-1) ?? '');
  for (const packId of [...onTape, ...view.linked.keys()]) {
    let commits: ReadCommit[];
    try {
      commits = await readCommits(repo.packs, repo.keys, packId, undefined, () => undefined);
    } catch (error) {
      if (!isKind(error, 'damaged')) throw error;
      continue;
    }
    for (const c of commits) {
      const point = `${names.get(c.commit.volumeId) ?? c.commit.volumeId} #${c.seq}`;
      for (const id of new Set([view.linked.get(packId) ?? packId, ...c.packIds.slice(1)])) {
        const list = users.get(id) ?? [];
        if (!list.includes(point)) list.push(point);
        users.set(id, list);
      }
    }
  }
  return users;
}
