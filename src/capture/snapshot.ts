/**
 * A snapshot: one whole capture of a device or image file, now. What the repository holds already is not stored again, and
 * what has not changed since the volume's last commit is not even named.
 */
import path from 'node:path';
import { open } from 'node:fs/promises';
import { B2Error } from '../errors.js';
import type { EventSink } from '../events.js';
import { Coverage, PointClass } from '../format/commit.js';
import { formatBytes } from '../human.js';
import type { ByteRange, DeviceFacts } from '../devices/device.js';
import { inspectDevice } from '../devices/inspect.js';
import { listMounts } from '../devices/mounts.js';
import { openReadDevice } from '../devices/open.js';
import { deviceStamp, unchangedSince, type DeviceStamp } from '../devices/stamp.js';
import { startProgress } from '../progress.js';
import { DedupeIndex } from '../repo/dedupe/index.js';
import { CondemnedPlaces } from '../repo/condemned.js';
import type { VolumeHistory } from '../repo/history.js';
import { openBlockMap } from '../repo/point.js';
import { groupFactsOf } from '../repo/point-set.js';
import { listQuarantine } from '../repo/quarantine.js';
import type { Repository } from '../repo/repository.js';
import {
  addSnapshot,
  checkSnapshotName,
  listSnapshots,
  listVolumes,
  writeVolumeMeta,
  type VolumeMeta,
} from '../repo/volume.js';
import {
  CondemnedError,
  VolumeWriter,
  type Acknowledged,
  type PlacedExtent,
} from '../repo/volume-writer.js';
import { syncFs, syscallsAvailable } from '../syscalls.js';
import { BLOCK_BYTES, blocksOf } from '../units.js';
import { changedExtents } from './changes.js';
import { scanDevice, type ScanResult } from './scan.js';

export interface SnapshotOptions {
  /** Path of a device or image file. */
  readonly device: string;
  /** Name of the volume; default: the one that was captured from this device of this host before, else HOST/DEVICE. */
  readonly volume?: string | undefined;
  /** Name of the snapshot; default: the time. */
  readonly name?: string | undefined;
  readonly tags: readonly string[];
  /** Go on where the device cannot be read; those blocks become zeros and the point is not exact. */
  readonly skipUnreadable: boolean;
  /** Write to a volume that another host has written. */
  readonly takeOver: boolean;
  readonly host: string;
  /** Where the local copy of the index of chunks is kept. */
  readonly dedupeCacheFile: string | undefined;
  /** Threads; 0: none (stores that live in this thread). */
  readonly workers: number;
  /** URL for the threads' own stores; undefined: scan in this thread. */
  readonly storeUrl: string | undefined;
  readonly signal: AbortSignal;
  readonly events: EventSink;
}

export interface SnapshotResult {
  readonly volume: VolumeMeta;
  readonly isNewVolume: boolean;
  readonly point: Acknowledged;
  readonly pointClass: PointClass;
  readonly name: string;
  readonly sizeBytes: number;
  /** Read from the device. */
  readonly readBytes: number;
  readonly changedBytes: number;
  readonly zeroBytes: number;
  readonly duplicateBytes: number;
  readonly newBytes: number;
  readonly storedBytes: number;
  readonly elapsedSeconds: number;
  readonly unreadable: readonly ByteRange[];
  /** Why the point is not exact; undefined if it is. */
  readonly notExact: string | undefined;
}

const MAX_TRIES = 4;

/** `HOST/sda`, `HOST/mapper/vg-root`, `HOST/srv/vm/disk.img`. */
export function defaultVolumeName(host: string, realPath: string): string {
  return `${host}/${realPath.replace(/^\/dev\//, '').replace(/^\/+/, '')}`;
}

/**
 * Finds or makes the volume that a device is captured to: the one named, else the one that was captured from this device of this host
 * before, else HOST/DEVICE. Kind `refused` if another host writes it.
 */
export async function volumeFor(
  repo: Repository,
  options: Pick<SnapshotOptions, 'volume' | 'host' | 'takeOver' | 'events'>,
  facts: DeviceFacts,
): Promise<{ volume: VolumeMeta; isNew: boolean }> {
  const warn = (message: string): void => options.events({ type: 'warning', message });
  const volumes = await listVolumes(repo, warn);
  const wanted = options.volume ?? defaultVolumeName(options.host, facts.realPath);
  const found =
    options.volume === undefined
      ? (volumes.find((v) => v.host === options.host && v.device === facts.realPath) ??
        volumes.find((v) => v.name === wanted))
      : volumes.find((v) => v.name === wanted || v.id === wanted);
  if (found !== undefined) {
    if (found.host !== options.host && !options.takeOver) {
      throw new B2Error(
        'refused',
        `volume ${found.name} is written by host ${found.host === '' ? '(unknown)' : found.host}, not by ${options.host}`,
        {
          hint: 'Name another volume with --volume, or use --take-over if that host is gone: its b2 will stop.',
        },
      );
    }
    return { volume: found, isNew: false };
  }
  if (!/^[^\p{C}:#\s][^\p{C}:]{0,199}$/u.test(wanted)) {
    throw new B2Error('usage', `"${wanted}" cannot be the name of a volume`, {
      hint: 'Use 1 to 200 printable characters without ":", not starting with "#"; --volume sets the name.',
    });
  }
  const now = repo.env.clock.nowNs();
  const volume: VolumeMeta = {
    id: repo.newId(),
    name: wanted,
    host: options.host,
    createdNs: now,
    device: facts.realPath,
    sizeBytes: facts.sizeBytes,
    logicalBlockBytes: facts.logicalBlockBytes,
    facts: {},
    updatedNs: now,
  };
  await writeVolumeMeta(repo, volume);
  return { volume, isNew: true };
}

/** Writes what file systems on the device still hold in memory, so that "now" is what the user sees. */
async function flushMounted(facts: DeviceFacts): Promise<void> {
  if (facts.kind !== 'block' || !syscallsAvailable()) return;
  for (const m of await listMounts()) {
    if (m.devNumber !== facts.devNumber && m.source !== facts.realPath) continue;
    const dir = await open(m.mountPoint, 'r').catch(() => undefined);
    if (dir === undefined) continue;
    try {
      await syncFs(dir.fd);
    } finally {
      await dir.close();
    }
  }
}

function timeName(ns: bigint): string {
  return new Date(Number(ns / 1_000_000n)).toISOString().replace(/\.\d+Z$/, 'Z');
}

/** A name that is free: the one that was asked for (kind `exists` if it is taken), or one made of the time. */
export async function freeName(
  repo: Repository,
  volume: Pick<VolumeMeta, 'id' | 'name'>,
  wanted: string | undefined,
): Promise<string> {
  const taken = new Set((await listSnapshots(repo, volume.id, () => undefined)).map((s) => s.name));
  if (wanted !== undefined) {
    checkSnapshotName(wanted);
    if (taken.has(wanted)) {
      throw new B2Error(
        'exists',
        `volume ${volume.name} has a snapshot named "${wanted}" already`,
        {
          hint: 'Choose another name; "b2 snapshots" lists them.',
        },
      );
    }
    return wanted;
  }
  const base = timeName(repo.env.clock.nowNs());
  let name = base;
  for (let i = 2; taken.has(name); i++) name = `${base}-${i}`;
  return name;
}

/**
 * Captures a device. When it resolves the point is acknowledged and named. The point is exact (class `crash`) only if it is
 * certain that nothing was written to the device from the first byte read to the last; else it is `fuzzy`, and `notExact` says why.
 */
export async function takeSnapshot(
  repo: Repository,
  options: SnapshotOptions,
): Promise<SnapshotResult> {
  const { clock } = repo.env;
  const began = clock.monotonicNs();
  if (options.name !== undefined) checkSnapshotName(options.name);
  const device = await openReadDevice(options.device);
  try {
    const { facts } = device;
    if (facts.sizeBytes === 0)
      throw new B2Error('refused', `${facts.path} has no bytes: there is nothing to capture`);
    const { volume, isNew } = await volumeFor(repo, options, facts);
    const name = await freeName(repo, volume, options.name);
    const condemned = new CondemnedPlaces(repo);
    await condemned.refresh();
    const { writer, history } = await VolumeWriter.claim(repo, volume.id);
    let closed = false;
    const warn = (error: B2Error): void =>
      options.events({
        type: 'warning',
        message: `the point is safe, but tidying up failed: ${error.message}`,
        ...(error.hint === undefined ? {} : { hint: error.hint }),
      });
    try {
      const contents = await inspectDevice(device);
      const identity = identityChange(volume, facts);
      if (identity !== undefined) options.events({ type: 'warning', message: identity });
      const index = await openIndex(repo, options);
      let tries = 0;
      for (;;) {
        index.setExcluded(await excludedPlaces(repo, condemned));
        const startedNs = clock.nowNs();
        await flushMounted(facts);
        const before = await deviceStamp(facts);
        const scan = await runScan(repo, options, facts, index, !condemned.isUncertain);
        const instantNs = clock.nowNs();
        const after = await deviceStamp((await device.refresh()) ?? facts);
        const notExact = whyNotExact(facts, before, after, scan);
        const extents = await changes(repo, history, scan);
        writer.addOwnPacks(scan.packs.map((p) => p.packId));
        const pointClass = notExact === undefined ? PointClass.crash : PointClass.fuzzy;
        try {
          const point = await writer.commit({
            pointClass,
            coverage: Coverage.unknown,
            full: history.tip === undefined,
            // Nothing changed in between: the state is that of every instant of the scan, the latest included.
            instantNs,
            startedNs,
            sizeBytes: facts.sizeBytes,
            extents,
            storedBytes: scan.stats.storedBytes,
            facts: {
              source: 'scan',
              host: options.host,
              device: facts.realPath,
              volume: volume.name,
              logicalBlockBytes: facts.logicalBlockBytes,
              ...(scan.unreadable.length === 0 ? {} : { unreadable: scan.unreadable }),
            },
          });
          const updated: VolumeMeta = {
            ...volume,
            host: options.host,
            device: facts.realPath,
            sizeBytes: facts.sizeBytes,
            logicalBlockBytes: facts.logicalBlockBytes,
            facts: {
              identity: facts.identity,
              contents,
              // It is of its group still: this is a point that the others lack.
              ...groupFactsOf(volume),
            },
            updatedNs: clock.nowNs(),
          };
          await addSnapshot(repo, {
            name,
            volumeId: volume.id,
            seq: point.seq,
            hash: point.hash.toString('hex'),
            instantNs: point.instantNs,
            pointClass,
            tags: options.tags,
            createdNs: clock.nowNs(),
          });
          await writeVolumeMeta(repo, updated);
          closed = true;
          await writer.close(warn);
          await saveIndex(index, options);
          return {
            volume: updated,
            isNewVolume: isNew,
            point,
            pointClass,
            name,
            sizeBytes: facts.sizeBytes,
            readBytes: scan.stats.readBytes,
            changedBytes: extents.reduce((n, e) => n + e.count * BLOCK_BYTES, 0),
            zeroBytes: scan.stats.zeroBytes,
            duplicateBytes: scan.stats.duplicateBytes,
            newBytes: scan.stats.newBytes,
            storedBytes: scan.stats.storedBytes,
            elapsedSeconds: Number(clock.monotonicNs() - began) / 1e9,
            unreadable: scan.unreadable,
            notExact,
          };
        } catch (error) {
          if (!(error instanceof CondemnedError) || ++tries >= MAX_TRIES) throw error;
          options.events({ type: 'note', message: `${error.message}; reading the device again` });
          await writer.reclaim();
          await condemned.refresh();
          await index.refresh({ signal: options.signal });
        }
      }
    } finally {
      if (!closed) await writer.close(() => undefined);
      await history.close();
    }
  } finally {
    await device.close();
  }
}

async function openIndex(repo: Repository, options: SnapshotOptions): Promise<DedupeIndex> {
  return DedupeIndex.open({
    ctx: repo.packContext(),
    cacheFile: options.dedupeCacheFile,
    signal: options.signal,
  });
}

async function saveIndex(index: DedupeIndex, options: SnapshotOptions): Promise<void> {
  try {
    await index.save();
  } catch (error) {
    if (!(error instanceof B2Error)) throw error;
    options.events({
      type: 'detail',
      message: `the local copy of the chunk index could not be written: ${error.message}`,
    });
  }
}

/** What must not be reused: what prune means to delete, and what repair found damaged. */
export async function excludedPlaces(
  repo: Repository,
  condemned: CondemnedPlaces,
): Promise<{ packs: string[]; frames: [string, readonly number[]][] }> {
  const packs: string[] = [];
  const frames = new Map<string, number[]>();
  const add = (packId: string, list: readonly number[]): void => {
    frames.set(packId, [...(frames.get(packId) ?? []), ...list]);
  };
  for (const c of condemned.readable()) {
    packs.push(...c.packs);
    for (const [id, list] of c.frames) add(id, list);
  }
  for (const q of await listQuarantine(repo)) {
    add(
      q.packId,
      q.frames.map((f) => f.number),
    );
  }
  return { packs, frames: [...frames] };
}

function runScan(
  repo: Repository,
  options: SnapshotOptions,
  facts: DeviceFacts,
  index: DedupeIndex,
  reuse: boolean,
): Promise<ScanResult> {
  const progress = startProgress({
    phase: `reading ${facts.path}`,
    totalBytes: facts.sizeBytes,
    clock: repo.env.clock,
    events: options.events,
  });
  let done = 0;
  return scanDevice({
    device: options.device,
    handle: repo.handle(options.storeUrl),
    store: repo.store,
    index,
    workers: options.workers,
    reuse,
    onReadError: options.skipUnreadable ? 'collect' : 'fail',
    signal: options.signal,
    clock: repo.env.clock,
    random: repo.env.random,
    onProgress: (stats) => {
      progress.add(stats.doneBytes - done);
      done = stats.doneBytes;
    },
  }).finally(() => progress.finish());
}

async function changes(
  repo: Repository,
  history: VolumeHistory,
  scan: ScanResult,
): Promise<PlacedExtent[]> {
  const chunkBlocks = blocksOf(repo.chunkBytes);
  const list: PlacedExtent[] = [];
  const { tip } = history;
  if (tip === undefined) {
    for (const e of scan.placements.extents()) if (e.packId !== undefined) list.push(e);
    return list;
  }
  const map = await openBlockMap(history, tip.seq);
  const oldBytes = map.commit.sizeBytes;
  const grown = scan.facts.sizeBytes > oldBytes;
  // Of a device that has grown, the block in which the old end lies is named in any case (FORMAT.md section 8).
  const beforeBlocks = grown ? Math.floor(oldBytes / BLOCK_BYTES) : blocksOf(scan.facts.sizeBytes);
  for await (const e of changedExtents(
    scan.placements.extents(),
    map.scan(0, Math.min(map.blocks, beforeBlocks)),
    beforeBlocks,
    chunkBlocks,
  )) {
    list.push(e);
  }
  return list;
}

function whyNotExact(
  facts: DeviceFacts,
  before: DeviceStamp,
  after: DeviceStamp,
  scan: ScanResult,
): string | undefined {
  if (scan.unreadable.length > 0) {
    const bytes = scan.unreadable.reduce((n, r) => n + r.length, 0);
    return `${formatBytes(bytes)} of ${facts.path} could not be read and are zeros in the point`;
  }
  if (before.counters === undefined || after.counters === undefined) {
    return `the kernel does not count the writes to ${facts.path}, so nobody knows whether it was written while it was read`;
  }
  if (!unchangedSince(before, after)) return `${facts.path} was written while it was read`;
  return undefined;
}

/** A warning if the device shows another serial number or the like than the volume recorded. */
function identityChange(volume: VolumeMeta, facts: DeviceFacts): string | undefined {
  const recorded = volume.facts['identity'];
  if (typeof recorded !== 'object' || recorded === null || facts.kind !== 'block') return undefined;
  const old = recorded as Record<string, unknown>;
  for (const key of ['serial', 'wwn', 'partitionUuid']) {
    const was = old[key];
    const is = facts.identity[key];
    if (typeof was === 'string' && is !== undefined && was !== is) {
      return `${facts.path} is another device than before (${key} ${is}, not ${was}); volume ${volume.name} goes on with its contents`;
    }
  }
  return undefined;
}

/** The file of the local chunk index of a repository. */
export function dedupeCacheFile(cacheDir: string, repositoryId: string): string {
  return path.join(cacheDir, repositoryId, 'chunks.idx');
}
