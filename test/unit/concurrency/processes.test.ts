/**
 * Real processes on one directory: two capture image files that share much of their contents, a third prunes without grace time and
 * verifies everything, all at once. What a writer was told of restores at the end bit for bit.
 */
import { spawn } from 'node:child_process';
import { rmSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { systemClock, systemRandom } from '../../../src/clock.js';
import { VolumeHistory } from '../../../src/repo/history.js';
import { openImage } from '../../../src/repo/point.js';
import { currentIdentity } from '../../../src/process-identity.js';
import { Repository } from '../../../src/repo/repository.js';
import { openDirectoryStore } from '../../../src/repo/store-directory.js';
import { listVolumes } from '../../../src/repo/volume.js';
import { compileForChild } from '../../support/compile.js';
import { digestOf } from '../../support/model-volume.js';
import { tempDir } from '../../support/tmp.js';

const SNAPSHOTS = 25;
const CHUNKS = 32;

const COMMON = `
import { createHash } from 'node:crypto';
import { writeFileSync } from 'node:fs';
const [, , repository, ...args] = process.argv;
const { Repository } = await import('./repo/repository.js');
const { openDirectoryStore } = await import('./repo/store-directory.js');
const { systemClock, systemRandom } = await import('./clock.js');
const { currentIdentity } = await import('./process-identity.js');
const env = { clock: systemClock, random: systemRandom, owner: currentIdentity() };
const open = async () => Repository.open(await openDirectoryStore(repository), [], env);
const tell = (o) => new Promise((done) => process.stdout.write(JSON.stringify(o) + '\\n', done));
`;

/** Captures its image again and again; what it holds comes from a few contents that both writers know. */
const WRITER = `${COMMON}
const { takeSnapshot } = await import('./capture/snapshot.js');
const [image, volume, count, chunks] = [args[0], args[1], Number(args[2]), Number(args[3])];
const data = Buffer.alloc(chunks * 65536);
let seed = volume.length + volume.charCodeAt(volume.length - 1);
const random = () => (seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0) / 4294967296;
for (let n = 0; n < count; n++) {
  for (let c = 1 + Math.floor(random() * 12); c > 0; c--) {
    const at = Math.floor(random() * chunks) * 65536;
    const content = Math.floor(random() * 40);
    for (let i = 0; i < 65536; i += 4) data.writeUInt32LE(content === 0 ? 0 : Math.imul(i + 1, content * 2654435761) >>> 0, at + i);
  }
  writeFileSync(image, data);
  const repo = await open();
  try {
    const r = await takeSnapshot(repo, {
      device: image, volume, tags: [], skipUnreadable: false, takeOver: false, host: volume, dedupeCacheFile: image + '.cache',
      workers: 0, storeUrl: undefined, signal: new AbortController().signal, events: () => undefined,
    });
    await tell({ seq: r.point.seq, digest: createHash('sha256').update(data).digest('hex') });
  } finally {
    await repo.close();
  }
}
`;

/** Prunes and verifies until its standard input ends. */
const READER = `${COMMON}
const { prune } = await import('./retention/prune.js');
const { verify } = await import('./verify/verify.js');
let over = false;
process.stdin.on('end', () => { over = true; }).resume();
const sums = { prunes: 0, deleted: 0, compacted: 0, held: 0, verified: 0 };
while (!over) {
  const repo = await open();
  try {
    const done = await prune(repo, { graceMs: 0 }).catch((e) => { if (e.kind !== 'held') throw e; sums.held++; });
    if (done !== undefined) { sums.prunes++; sums.deleted += done.packsDeleted; sums.compacted += done.packsCompacted; }
    const report = await verify(repo, { dataShare: 1, events: () => undefined });
    const bad = report.findings.filter((f) => f.severity !== 'note');
    if (bad.length > 0) throw new Error('verify: ' + bad.map((f) => f.object + ': ' + f.message).join('; '));
    sums.verified++;
  } finally {
    await repo.close();
  }
}
await tell(sums);
`;

const compiled = compileForChild(
  'capture/snapshot.ts',
  'retention/prune.ts',
  'verify/verify.ts',
  'clock.ts',
);
afterAll(() => {
  rmSync(compiled, { recursive: true, force: true });
});

interface Child {
  readonly lines: Promise<Record<string, unknown>[]>;
  end(): void;
}

function start(name: string, script: string, args: readonly string[]): Child {
  const file = path.join(compiled, `${name}.mjs`);
  writeFileSync(file, script);
  const child = spawn(process.execPath, [file, ...args], { stdio: ['pipe', 'pipe', 'pipe'] });
  let out = '';
  let err = '';
  child.stdout.setEncoding('utf8').on('data', (text: string) => (out += text));
  child.stderr.setEncoding('utf8').on('data', (text: string) => (err += text));
  const lines = new Promise<Record<string, unknown>[]>((resolve, reject) => {
    child.on('error', reject);
    child.on('close', (code) => {
      if (code !== 0) reject(new Error(`${name} ended with ${code}: ${err}`));
      else
        resolve(
          out
            .trim()
            .split('\n')
            .map((line) => JSON.parse(line) as Record<string, unknown>),
        );
    });
  });
  return { lines, end: () => child.stdin.end() };
}

describe('three processes on one directory', () => {
  it('keep every point that was acknowledged', { timeout: 180_000 }, async () => {
    await using dir = tempDir();
    const repository = dir.join('repo');
    const env = { clock: systemClock, random: systemRandom, owner: currentIdentity() };
    const store = await openDirectoryStore(repository, { create: true });
    const repo = await Repository.init(
      store,
      { encryption: 'none', chunkBytes: 65_536, packBytes: 1024 * 1024 },
      undefined,
      env,
    );
    const volumes = ['host-1/a', 'host-2/b'];
    let writing = volumes.length;
    const reader = start('reader', READER, [repository]);
    const writers = volumes.map((v, i) =>
      start(`writer-${i}`, WRITER, [
        repository,
        dir.join(`${i}.img`),
        v,
        String(SNAPSHOTS),
        String(CHUNKS),
      ]),
    );
    const [read, ...ended] = await Promise.allSettled([
      reader.lines,
      ...writers.map((w) => w.lines.finally(() => void (--writing === 0 && reader.end()))),
    ]);
    if (read.status !== 'fulfilled') throw read.reason;
    const [sums] = read.value;
    const metas = await listVolumes(repo, (text) => {
      throw new Error(text);
    });
    let points = 0;
    for (const [i, name] of volumes.entries()) {
      const told = ended[i];
      if (told?.status !== 'fulfilled') throw told?.reason;
      expect(told.value.length).toBe(SNAPSHOTS);
      const meta = metas.find((m) => m.name === name);
      if (meta === undefined) throw new Error(`no volume ${name}`);
      const history = await VolumeHistory.open(repo, meta.id);
      expect(history.problems).toEqual([]);
      for (const { seq, digest } of told.value) {
        const image = await openImage(history, meta, Number(seq));
        const all = Buffer.alloc(image.sizeBytes, 0xee);
        await image.read(all, 0);
        expect(digestOf(all), `point ${String(seq)} of ${name}`).toBe(digest);
        points++;
      }
      await history.close();
    }
    await repo.close();
    console.log(`processes: ${points} points of two writers beside ${JSON.stringify(sums)}`);
    expect(Number(sums?.['prunes'])).toBeGreaterThan(0);
    expect(Number(sums?.['verified'])).toBeGreaterThan(0);
  });
});
