/**
 * The golden repositories (test/fixtures/golden/README.md): every point of each restores bit for bit by today's code and by
 * the independent extractor, and today's codecs make the same bytes again from what they read.
 */
import { cpSync, readFileSync, readdirSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import {
  className,
  decodeCommit,
  encodeCommit,
  type PointClass,
} from '../../../src/format/commit.js';
import { decodeConfig, encodeConfig } from '../../../src/format/config.js';
import { EXTENT_RECORD_BYTES, decodeExtent, encodeExtents } from '../../../src/format/extent.js';
import {
  FRAME_HEADER_BYTES,
  FrameType,
  decodeChunkEntries,
  decodeFrameHeader,
  encodeChunkEntry,
  encodeFrameHeader,
} from '../../../src/format/frame.js';
import { packIdOf, parseSegmentName, segmentName } from '../../../src/format/names.js';
import { ObjectKind, decodeObject, encodeObject } from '../../../src/format/object.js';
import {
  PACK_HEADER_BYTES,
  PACK_TRAILER_BYTES,
  decodeFooter,
  decodePackHeader,
  decodeTrailer,
  encodeFooter,
  encodePackHeader,
} from '../../../src/format/pack.js';
import { SEAL_BYTES, numberNonce } from '../../../src/format/seal.js';
import {
  COMMIT_RECORD_BYTES,
  PAGE_HEADER_BYTES,
  PageType,
  SEGMENT_HEADER_BYTES,
  SEGMENT_TRAILER_BYTES,
  decodeCommitRecord,
  decodePageHeader,
  decodeSegmentHeader,
  decodeSegmentIndex,
  decodeSegmentTrailer,
  encodeCommitRecord,
  encodeSegmentHeader,
  encodeSegmentIndex,
  encodeSegmentTrailer,
  openPage,
  sealPage,
} from '../../../src/format/segment.js';
import { lz4 } from '../../../src/lz4.js';
import { VolumeHistory } from '../../../src/repo/history.js';
import { parseKeyFile, type Secret } from '../../../src/repo/keys.js';
import { openFrameBytes, verifiedChunks } from '../../../src/repo/pack-reader.js';
import { openImage } from '../../../src/repo/point.js';
import { Repository } from '../../../src/repo/repository.js';
import { openDirectoryStore } from '../../../src/repo/store-directory.js';
import { listSnapshots, listVolumes } from '../../../src/repo/volume.js';
import { Repository as ForeignRepository, extract, list } from '../../extractor/extract.mjs';
import { digestOf, testEnvironment, seeded } from '../../support/model-volume.js';
import { tempDir, type TempDir } from '../../support/tmp.js';

interface GoldenPoint {
  readonly seq: number;
  readonly hash: string;
  readonly instantNs: string;
  readonly pointClass: PointClass;
  readonly sizeBytes: number;
  readonly sha256: string;
}
interface GoldenVolume {
  readonly id: string;
  readonly name: string;
  readonly snapshots: readonly { readonly name: string; readonly seq: number }[];
  readonly points: readonly GoldenPoint[];
}
interface GoldenRepository {
  readonly name: string;
  readonly password?: string;
  readonly passwords?: readonly string[];
  readonly keyFile?: string;
  readonly volumes: readonly GoldenVolume[];
}

const GOLDEN = fileURLToPath(new URL('../../fixtures/golden', import.meta.url));
const VERSIONS = readdirSync(GOLDEN).filter((name) => /^v\d+/.test(name));

let dir: TempDir;
beforeAll(() => {
  dir = tempDir();
  // git keeps no empty directories and no modes, and nothing may be written into the originals.
  for (const version of VERSIONS)
    cpSync(join(GOLDEN, version), dir.join(version), { recursive: true });
});
afterAll(() => dir.remove());

function expected(version: string): readonly GoldenRepository[] {
  const text = readFileSync(join(GOLDEN, version, 'expected.json'), 'utf8');
  return (JSON.parse(text) as { repositories: GoldenRepository[] }).repositories;
}

function secretsOf(version: string, golden: GoldenRepository): readonly Secret[] {
  if (golden.keyFile !== undefined) {
    const path = join(GOLDEN, version, golden.keyFile);
    return [
      { kind: 'keyFile', material: parseKeyFile(readFileSync(path, 'utf8'), path), source: path },
    ];
  }
  return (golden.passwords ?? []).map((password) => ({
    kind: 'password',
    password,
    source: 'golden',
  }));
}

async function open(
  version: string,
  golden: GoldenRepository,
  secrets = secretsOf(version, golden),
): Promise<Repository> {
  const store = await openDirectoryStore(dir.join(version, golden.name));
  return Repository.open(store, secrets, testEnvironment(seeded(1)));
}

/** Names of all objects, with `/`. */
function objectsOf(version: string, golden: GoldenRepository): string[] {
  const base = join(GOLDEN, version, golden.name);
  return readdirSync(base, { recursive: true, encoding: 'utf8' })
    .filter((name) => statSync(join(base, name)).isFile())
    .sort();
}

function kindOf(name: string): ObjectKind | undefined {
  if (name.endsWith('/meta')) return ObjectKind.volumeMeta;
  if (/\/epochs\//.test(name)) return ObjectKind.epoch;
  if (/\/journal\//.test(name)) return ObjectKind.journal;
  if (/\/snapshots\//.test(name)) return ObjectKind.snapshot;
  return undefined;
}

/** Each frame of a pack up to the footer or the torn end: offset and bytes. */
function framesOf(pack: Buffer, end: number): Buffer[] {
  const frames: Buffer[] = [];
  for (let at = PACK_HEADER_BYTES; at + FRAME_HEADER_BYTES <= end;) {
    if (pack.toString('latin1', at, at + 4) !== 'B2FR') break;
    const next = at + FRAME_HEADER_BYTES + decodeFrameHeader(pack, at, 'pack').storedBytes;
    frames.push(pack.subarray(at, next));
    at = next;
  }
  return frames;
}

function checkPack(
  repo: Repository,
  packId: string,
  pack: Buffer,
): { readonly sealed: boolean; readonly commits: number } {
  const { keys } = repo;
  const header = decodePackHeader(pack.subarray(0, PACK_HEADER_BYTES), {
    packId,
    repositoryId: repo.id,
  });
  expect(encodePackHeader(header)).toEqual(pack.subarray(0, PACK_HEADER_BYTES));
  const trailer = decodeTrailer(pack.subarray(pack.length - PACK_TRAILER_BYTES), pack.length);
  if (trailer !== undefined) {
    const { offset, lengthBytes } = trailer;
    const footer = pack.subarray(offset, offset + lengthBytes);
    const salt = footer.subarray(FRAME_HEADER_BYTES, FRAME_HEADER_BYTES + 16);
    expect(encodeFooter(decodeFooter(footer, packId, keys), packId, offset, salt, keys)).toEqual(
      pack.subarray(offset),
    );
  }
  const sealer = keys.packSealer(packId);
  let commits = 0;
  for (const bytes of framesOf(pack, trailer?.offset ?? pack.length)) {
    const frame = openFrameBytes({ lz4: lz4() }, sealer, packId, bytes);
    const again = Buffer.alloc(bytes.length);
    encodeFrameHeader(frame.header, again, 0);
    const aad = Buffer.concat([Buffer.from(packId, 'hex'), again.subarray(0, FRAME_HEADER_BYTES)]);
    const plain = sealer.open(
      numberNonce(frame.header.number),
      aad,
      bytes.subarray(FRAME_HEADER_BYTES),
    );
    if (plain === undefined) throw new Error('the seal does not open');
    const copy = Buffer.from(plain);
    expect(copy.length).toBe(bytes.length - FRAME_HEADER_BYTES - SEAL_BYTES);
    if (frame.header.type === FrameType.chunks) {
      verifiedChunks(frame, packId, keys);
      const head = Buffer.alloc(frame.head.length);
      decodeChunkEntries(frame.head, frame.header, 'frame').forEach((entry, i) => {
        encodeChunkEntry(entry.id, entry.lengthBytes, head, i * 36);
      });
      expect(head).toEqual(frame.head);
    } else if (frame.header.type === FrameType.commit) {
      commits++;
      expect(encodeCommit(decodeCommit(frame.body, 'commit'))).toEqual(frame.body);
    }
    sealer.sealInto(numberNonce(frame.header.number), aad, [copy], again, FRAME_HEADER_BYTES);
    expect(again.equals(bytes)).toBe(true);
  }
  return { sealed: trailer !== undefined, commits };
}

function checkSegment(repo: Repository, name: string, segment: Buffer): void {
  const parsed = parseSegmentName(name);
  if (parsed === undefined) throw new Error(`${name} is no segment's name`);
  expect(name.endsWith(segmentName(parsed))).toBe(true);
  const headerBytes = segment.subarray(0, SEGMENT_HEADER_BYTES);
  const header = decodeSegmentHeader(headerBytes, name);
  expect(encodeSegmentHeader(header)).toEqual(headerBytes);
  const trailer = segment.subarray(segment.length - SEGMENT_TRAILER_BYTES);
  const indexOffset = decodeSegmentTrailer(trailer, segment.length, name);
  expect(encodeSegmentTrailer(indexOffset)).toEqual(trailer);
  const sealer = repo.keys.segmentSealer(Buffer.from(header.salt));
  const types = new Set<number>();
  for (let at = SEGMENT_HEADER_BYTES; at < segment.length - SEGMENT_TRAILER_BYTES;) {
    const { type, number, storedBytes } = decodePageHeader(segment.subarray(at), name, at);
    const page = segment.subarray(at, at + PAGE_HEADER_BYTES + storedBytes);
    const plain = openPage(sealer, headerBytes, type, number, page, name, at);
    expect(sealPage(sealer, headerBytes, type, number, plain).equals(page)).toBe(true);
    types.add(type);
    if (type === PageType.index) {
      expect(at).toBe(indexOffset);
      expect(encodeSegmentIndex(decodeSegmentIndex(plain, header, indexOffset, name))).toEqual(
        plain,
      );
    } else if (type === PageType.extents) {
      const records = Array.from({ length: plain.length / EXTENT_RECORD_BYTES }, (_, i) =>
        decodeExtent(plain, i * EXTENT_RECORD_BYTES, name),
      );
      expect(encodeExtents(records)).toEqual(plain);
    } else if (type === PageType.commits) {
      const again = Buffer.alloc(plain.length);
      for (let pos = 0; pos < plain.length; pos += COMMIT_RECORD_BYTES) {
        const record = decodeCommitRecord(plain, pos, name);
        encodeCommitRecord(record, record.pack, again, pos);
      }
      expect(again).toEqual(plain);
    }
    at += page.length;
  }
  expect([...types].sort()).toEqual([
    PageType.extents,
    PageType.commits,
    PageType.packIds,
    PageType.index,
  ]);
}

describe.each(VERSIONS)('golden repositories %s', (version) => {
  const repositories = expected(version);

  it('are all listed', () => {
    const folders = readdirSync(join(GOLDEN, version), { withFileTypes: true }).filter((e) =>
      e.isDirectory(),
    );
    expect(folders.map((e) => e.name).sort()).toEqual(repositories.map((r) => r.name).sort());
  });

  describe.each(repositories.map((r) => [r.name, r] as const))('%s', (_name, golden) => {
    it('restores every point bit for bit', async () => {
      await using repo = await open(version, golden);
      const volumes = await listVolumes(repo, (warning) => expect(warning).toBe('no warning'));
      expect(volumes.map((v) => [v.id, v.name]).sort()).toEqual(
        golden.volumes.map((v) => [v.id, v.name]).sort(),
      );
      for (const want of golden.volumes) {
        const meta = volumes.find((v) => v.id === want.id);
        if (meta === undefined) throw new Error(want.id);
        const snapshots = await listSnapshots(repo, want.id, (warning) =>
          expect(warning).toBe('no warning'),
        );
        expect(snapshots.map(({ name, seq }) => ({ name, seq }))).toEqual(want.snapshots);
        const history = await VolumeHistory.open(repo, want.id);
        try {
          history.refuseGap();
          expect(history.tip?.seq).toBe(want.points.length);
          for (const point of want.points) {
            const image = await openImage(history, meta, point.seq);
            expect(image.sizeBytes).toBe(point.sizeBytes);
            const all = Buffer.alloc(point.sizeBytes, 0xee);
            await image.read(all, 0);
            expect([point.seq, digestOf(all)]).toEqual([point.seq, point.sha256]);
          }
        } finally {
          await history.close();
        }
      }
    });

    it('opens with each of its keys by itself, and with no other', async () => {
      for (const secret of secretsOf(version, golden))
        await (await open(version, golden, [secret])).close();
      if (golden.password === undefined && golden.keyFile === undefined) return;
      const wrong: Secret = { kind: 'password', password: 'wrong', source: 'the test' };
      await expect(open(version, golden, [wrong])).rejects.toMatchObject({ code: 12 });
    });

    it.each([
      ['segments and journal', false],
      ['packs only', true],
    ])('is read by the extractor (%s)', (_way, packsOnly) => {
      const secrets = secretsOf(version, golden).map((s) =>
        s.kind === 'password' ? { password: s.password } : { keyMaterial: Buffer.from(s.material) },
      );
      const foreign = new ForeignRepository(dir.join(version, golden.name), secrets[0] ?? {});
      try {
        const listing = list(foreign, packsOnly);
        for (const want of golden.volumes) {
          const found = listing.volumes.find((v) => v.id === want.id);
          expect(found?.points.map((p) => [p.seq, p.class, p.hash, p.sizeBytes])).toEqual(
            want.points.map((p) => [p.seq, className(p.pointClass), p.hash, p.sizeBytes]),
          );
          expect(
            found?.snapshots.map(({ name, seq }) => ({ name, seq })).sort((a, b) => a.seq - b.seq),
          ).toEqual(want.snapshots);
          for (const point of want.points) {
            const out = dir.join(`${golden.name}-${want.id}-${point.seq}-${packsOnly}`);
            extract(foreign, packsOnly, want.id, String(point.seq), out, null);
            expect([point.seq, digestOf(readFileSync(out))]).toEqual([point.seq, point.sha256]);
          }
        }
      } finally {
        foreign.close();
      }
    });

    it('is made again, byte for byte, from what is read', async () => {
      await using repo = await open(version, golden);
      const seen = { config: 0, object: 0, pack: 0, segment: 0, commits: 0 };
      for (const name of objectsOf(version, golden)) {
        const bytes = readFileSync(join(GOLDEN, version, golden.name, name));
        const kind = kindOf(name);
        const packId = packIdOf(name);
        if (name.startsWith('locks/')) continue; // outside the format
        if (name === 'config' || name === 'config.copy') {
          seen.config++;
          expect(encodeConfig(decodeConfig(bytes)).toString()).toBe(bytes.toString());
        } else if (kind !== undefined) {
          seen.object++;
          const payload = decodeObject(kind, name, bytes, repo.keys);
          expect(
            encodeObject(kind, name, payload, bytes.subarray(16, 32), repo.keys).equals(bytes),
          ).toBe(true);
        } else if (packId !== undefined) {
          seen.pack++;
          seen.commits += checkPack(repo, packId, bytes).commits;
        } else {
          seen.segment++;
          checkSegment(repo, name, bytes);
        }
      }
      expect(seen.config).toBe(2);
      expect(seen.commits).toBe(golden.volumes.reduce((n, v) => n + v.points.length, 0));
      for (const count of Object.values(seen)) expect(count).toBeGreaterThan(0);
    });
  });
});
