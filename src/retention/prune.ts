/**
 * Prune: gives back the space of what no commit uses, in two steps with a grace time between (FORMAT.md 6.7, 6.8).
 *
 * What makes it safe while others write. Something is deleted only after it was named in a condemned object, and each writer looks
 * at the condemned objects after its commit is durable and before it is acknowledged. So a commit that uses a place was
 * either durable when the deletion worked out what is unused (then the place is spared), or its writer sees the place condemned
 * (then the commit is not acknowledged, and the data are stored anew). The grace time only makes the second case rare.
 */
import { isKind } from '../errors.js';
import { ignoreEvents, type EventSink } from '../events.js';
import { FRAME_HEADER_BYTES, FrameType } from '../format/frame.js';
import { condemnedName, journalName, packIdOf, packName } from '../format/names.js';
import {
  PACK_HEADER_BYTES,
  decodePackHeader,
  encodeFooter,
  encodePackHeader,
  type FooterFrame,
  type PackFooter,
} from '../format/pack.js';
import {
  CONDEMNED_KEPT_NS,
  CondemnedPlaces,
  putCondemned,
  type Condemned,
} from '../repo/condemned.js';
import { acquireLease, type Lease } from '../repo/lease.js';
import { maintainVolume } from '../repo/maintenance.js';
import { OpenPack, openFrameBytes, verifiedChunks } from '../repo/pack-reader.js';
import type { Repository } from '../repo/repository.js';
import { listVolumeIds } from '../repo/volume.js';
import { findLiveness, type Liveness } from './liveness.js';

export const DEFAULT_GRACE_MS = 24 * 3600 * 1000;
/** A pack is rewritten when at least this part of it is unused: less is not worth the writing. */
export const COMPACT_SHARE = 0.2;
/** A claim of a volume may hold the lease for a moment (volume-writer.ts): no reason to give up. */
const CLAIM_WAIT_MS = 5000;
const NS_PER_MS = 1_000_000n;

export interface PruneOptions {
  /** How long something must be unused before it is condemned, and condemned before it is deleted. Default a day. */
  readonly graceMs?: number;
  /** Say what would be done; change nothing, take no lease. */
  readonly dryRun?: boolean;
  readonly signal?: AbortSignal;
  readonly events?: EventSink;
}

export interface PruneResult {
  /** Deleted or compacted away now. */
  readonly freedBytes: number;
  readonly packsDeleted: number;
  readonly packsCompacted: number;
  /** Condemned now; a run after the grace time frees it. */
  readonly condemnedBytes: number;
  readonly condemnedPacks: number;
  readonly condemnedFrames: number;
  /** Unused but younger than the grace time, or not worth rewriting a pack for. */
  readonly waitingBytes: number;
  readonly totalBytes: number;
}

interface Found {
  readonly packs: { readonly packId: string; readonly bytes: number }[];
  readonly frames: Map<string, { readonly numbers: number[]; readonly bytes: number }>;
  readonly waitingBytes: number;
  readonly totalBytes: number;
}

/** Frames that no commit uses. Extents frames count as used while a commit of their pack is. */
function deadFrames(footer: PackFooter, packId: string, live: Liveness): FooterFrame[] {
  const hasCommit = live.commits.hasPack(packId);
  return footer.frames.filter((f) => {
    switch (f.type) {
      case FrameType.chunks:
        return !live.chunks.has(packId, f.number);
      case FrameType.commit:
        return !live.commits.has(packId, f.number);
      default:
        return !hasCommit;
    }
  });
}

const bytesOf = (frames: readonly FooterFrame[]): number =>
  frames.reduce((n, f) => n + f.storedBytes + FRAME_HEADER_BYTES, 0);

/** Runs both steps once. Kinds `held` (another prune runs), `refused` (a history is damaged), `io`, `no-space`. */
export async function prune(repo: Repository, options: PruneOptions = {}): Promise<PruneResult> {
  if (options.dryRun === true) return pruneHeld(repo, options, undefined);
  await using lease = await acquireLease(repo.store, 'prune', {
    ...repo.env,
    purpose: 'prune',
    waitMs: CLAIM_WAIT_MS,
  });
  return await pruneHeld(repo, options, lease);
}

async function pruneHeld(
  repo: Repository,
  options: PruneOptions,
  lease: Lease | undefined,
): Promise<PruneResult> {
  const { signal } = options;
  const graceNs = BigInt(Math.round(options.graceMs ?? DEFAULT_GRACE_MS)) * NS_PER_MS;
  const events = options.events ?? ignoreEvents;
  const now = repo.env.clock.nowNs();
  const condemned = new CondemnedPlaces(repo);
  await condemned.refresh();
  // After the condemned objects were read: a commit that this does not see sees them (see the file comment).
  const live = await findLiveness(repo, signal);

  let freedBytes = 0;
  let packsDeleted = 0;
  let packsCompacted = 0;
  for (const c of condemned.readable()) {
    signal?.throwIfAborted();
    const age = now - c.createdNs;
    if (age < graceNs || lease === undefined) continue;
    for (const packId of c.packs) {
      if (live.chunks.hasPack(packId) || live.commits.hasPack(packId)) continue;
      const there = await repo.store.stat(packName(packId));
      if (there === undefined) continue;
      await lease.assertHeld();
      await removeJournalEntries(repo, packId);
      repo.packs.forget(packId);
      await repo.store.delete(packName(packId));
      freedBytes += there.sizeBytes;
      packsDeleted++;
    }
    for (const [packId, numbers] of c.frames) {
      signal?.throwIfAborted();
      const freed = await compact(repo, lease, packId, new Set(numbers), live, events);
      freedBytes += freed;
      if (freed > 0) packsCompacted++;
    }
    if (age >= CONDEMNED_KEPT_NS + graceNs) await repo.store.delete(condemnedName(c.id));
  }

  const found = await findDead(repo, live, condemned, now - graceNs, signal, events);
  const framesBytes = [...found.frames.values()].reduce((n, f) => n + f.bytes, 0);
  const packsBytes = found.packs.reduce((n, p) => n + p.bytes, 0);
  if (lease !== undefined && (found.packs.length > 0 || found.frames.size > 0)) {
    await lease.assertHeld();
    const c: Condemned = {
      id: repo.newId(),
      createdNs: repo.env.clock.nowNs(),
      packs: found.packs.map((p) => p.packId),
      frames: new Map([...found.frames].map(([id, f]) => [id, f.numbers])),
    };
    await putCondemned(repo, c);
  }
  if (lease !== undefined) {
    for (const { id } of await listVolumeIds(repo)) await maintainVolume(repo, id, signal);
  }
  return {
    freedBytes,
    packsDeleted,
    packsCompacted,
    condemnedBytes: packsBytes + framesBytes,
    condemnedPacks: found.packs.length,
    condemnedFrames: [...found.frames.values()].reduce((n, f) => n + f.numbers.length, 0),
    waitingBytes: found.waitingBytes,
    totalBytes: found.totalBytes,
  };
}

async function removeJournalEntries(repo: Repository, packId: string): Promise<void> {
  for (const { id } of await listVolumeIds(repo)) await repo.store.delete(journalName(id, packId));
}

/** What can be condemned now: unused, created before `beforeNs`, not condemned yet. */
async function findDead(
  repo: Repository,
  live: Liveness,
  condemned: CondemnedPlaces,
  beforeNs: bigint,
  signal: AbortSignal | undefined,
  events: EventSink,
): Promise<Found> {
  const found: Found = { packs: [], frames: new Map(), waitingBytes: 0, totalBytes: 0 };
  let waitingBytes = 0;
  let totalBytes = 0;
  for await (const { name, sizeBytes } of repo.store.list('packs')) {
    signal?.throwIfAborted();
    const packId = packIdOf(name);
    if (packId === undefined) continue;
    totalBytes += sizeBytes;
    const unused = !live.chunks.hasPack(packId) && !live.commits.hasPack(packId);
    if (unused) {
      // It may be damaged, or torn before its header was whole: nobody needs it either way.
      const created = await createdOf(repo, packId);
      if (created !== undefined && created >= beforeNs) waitingBytes += sizeBytes;
      else if (created === undefined) continue;
      else if (!condemned.has(packId, undefined)) found.packs.push({ packId, bytes: sizeBytes });
      continue;
    }
    let pack: OpenPack;
    try {
      pack = await OpenPack.open(repo.packContext(), packId);
    } catch (error) {
      if (isKind(error, 'not-found')) continue;
      if (!isKind(error, 'damaged')) throw error;
      events({
        type: 'warning',
        message: `${error.message}: left as it is`,
        hint: 'Run "b2 verify".',
      });
      continue;
    }
    try {
      if (!pack.sealed) continue; // somebody may be writing it
      const dead = deadFrames(pack.footer, packId, live).filter(
        (f) => !condemned.has(packId, f.number),
      );
      const bytes = bytesOf(dead);
      if (bytes === 0) continue;
      if (pack.header.createdNs < beforeNs && bytes >= COMPACT_SHARE * sizeBytes) {
        found.frames.set(packId, { numbers: dead.map((f) => f.number), bytes });
      } else {
        waitingBytes += bytes;
      }
    } finally {
      await pack.close();
    }
  }
  return { ...found, waitingBytes, totalBytes };
}

/** The time in a pack's header; 0 where the header is torn; undefined where the pack has gone or is another repository's. */
async function createdOf(repo: Repository, packId: string): Promise<bigint | undefined> {
  try {
    const head = await repo.store.get(packName(packId), { offset: 0, length: PACK_HEADER_BYTES });
    if (head.length < PACK_HEADER_BYTES || head.every((b) => b === 0)) return 0n;
    return decodePackHeader(head, { packId, repositoryId: repo.id }).createdNs;
  } catch (error) {
    if (isKind(error, 'not-found', 'damaged')) return undefined;
    throw error;
  }
}

/**
 * Rewrites a pack without those of `numbers` that are still unused; returns the bytes saved. Frames that stay are verified
 * before the old pack is replaced: of a pack with damage nothing is thrown away.
 */
async function compact(
  repo: Repository,
  lease: Lease,
  packId: string,
  numbers: ReadonlySet<number>,
  live: Liveness,
  events: EventSink,
): Promise<number> {
  const ctx = repo.packContext();
  let pack: OpenPack;
  try {
    pack = await OpenPack.open(ctx, packId);
  } catch (error) {
    if (isKind(error, 'not-found')) return 0;
    if (!isKind(error, 'damaged')) throw error;
    events({
      type: 'warning',
      message: `${error.message}: not compacted`,
      hint: 'Run "b2 verify".',
    });
    return 0;
  }
  try {
    if (!pack.sealed) return 0;
    const dead = new Set(
      deadFrames(pack.footer, packId, live)
        .filter((f) => numbers.has(f.number))
        .map((f) => f.number),
    );
    if (dead.size === 0) return 0;
    const sealer = ctx.keys.packSealer(packId);
    const parts: Buffer[] = [
      encodePackHeader({ ...pack.header, generation: pack.header.generation + 1 }),
    ];
    const frames: FooterFrame[] = [];
    const ids: Buffer[] = [];
    const lengths: number[] = [];
    let at = PACK_HEADER_BYTES;
    let chunk = 0;
    for (const f of pack.footer.frames) {
      const first = chunk;
      chunk += f.count;
      if (dead.has(f.number)) continue;
      const bytes = Buffer.allocUnsafe(FRAME_HEADER_BYTES + f.storedBytes);
      await pack.readRaw(bytes, f.offset);
      const open = openFrameBytes(ctx, sealer, packId, bytes);
      if (f.type === FrameType.chunks) verifiedChunks(open, packId, ctx.keys);
      parts.push(bytes);
      frames.push({ ...f, offset: at });
      ids.push(pack.footer.ids.subarray(first * 32, chunk * 32));
      for (let i = first; i < chunk; i++) lengths.push(pack.footer.lengths[i] ?? 0);
      at += bytes.length;
    }
    const footer: PackFooter = {
      frames,
      ids: Buffer.concat(ids),
      lengths: Uint32Array.from(lengths),
    };
    parts.push(encodeFooter(footer, packId, at, repo.newSalt(), ctx.keys));
    const whole = Buffer.concat(parts);
    const before = await repo.store.stat(packName(packId));
    await lease.assertHeld();
    await repo.store.put(packName(packId), whole);
    repo.packs.forget(packId);
    return Math.max(0, (before?.sizeBytes ?? whole.length) - whole.length);
  } catch (error) {
    if (!isKind(error, 'damaged')) throw error;
    events({
      type: 'warning',
      message: `${error.message}: the pack is not compacted`,
      hint: 'Run "b2 verify".',
    });
    return 0;
  } finally {
    await pack.close();
  }
}
