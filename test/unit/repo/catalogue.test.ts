import { chmodSync, readFileSync, readdirSync, statSync, writeFileSync } from 'node:fs';
import { rm } from 'node:fs/promises';
import { createRequire } from 'node:module';
import { dirname } from 'node:path';
import { describe, expect, it } from 'vitest';
import { PointClass } from '../../../src/format/commit.js';
import { ObjectKind } from '../../../src/format/object.js';
import { Catalogue, cataloguePath } from '../../../src/repo/catalogue.js';
import { addSnapshot } from '../../../src/repo/volume.js';
import { newModel, seeded } from '../../support/model-volume.js';
import { MemoryStore } from '../../support/store-memory.js';
import { SteppedClock } from '../../support/stepped-clock.js';
import { tempDir } from '../../support/tmp.js';

const ID = 'ab'.repeat(16);
const PACK = 'cd'.repeat(16);

function open(cacheDir: string, warnings: string[] = []): Promise<Catalogue> {
  return Catalogue.open({
    cacheDir,
    repositoryId: ID,
    clock: new SteppedClock(),
    warn: (m) => void warnings.push(m),
  });
}

describe('the catalogue', () => {
  it('keeps what it is told, exactly, in a private file', async () => {
    await using dir = tempDir();
    const first = await open(dir.path);
    const ns = 1_795_363_867_123_456_789n; // above 2^53
    await first.recordTip({
      volumeId: '01'.repeat(16),
      name: 'a/b',
      seq: 7,
      hash: 'ff',
      instantNs: ns,
    });
    await first.recordPacks([
      { packId: PACK, generation: 2, sizeBytes: 5, verifiedNs: ns, damaged: true },
    ]);
    await first.recordEvent({ kind: 'verify', content: { damage: 1 } });
    for (const mac of ['one', 'two', 'two', 'three']) await first.recordConfig(mac);
    await first.close();
    expect(statSync(cataloguePath(dir.path, ID)).mode & 0o777).toBe(0o600);
    expect(statSync(dirname(cataloguePath(dir.path, ID))).mode & 0o777).toBe(0o700);
    await using again = await open(dir.path);
    expect((await again.seenTips()).get('01'.repeat(16))).toMatchObject({
      seq: 7,
      hash: 'ff',
      instantNs: ns,
      name: 'a/b',
    });
    expect((await again.packs()).get(PACK)).toEqual({
      packId: PACK,
      generation: 2,
      sizeBytes: 5,
      verifiedNs: ns,
      damaged: true,
    });
    expect(await again.lastEvent('verify')).toMatchObject({ content: { damage: 1 } });
    expect(await again.lastEvent('repair')).toBeUndefined();
    expect(await again.configs()).toEqual(['one', 'two', 'three']);
    await again.recordConfig('one');
    expect(await again.configs()).toEqual(['two', 'three', 'one']);
    await again.forgetPacks([PACK]);
    expect((await again.packs()).size).toBe(0);
  });

  it('never forgets a newer commit for an older one', async () => {
    await using dir = tempDir();
    await using c = await open(dir.path);
    const tip = { volumeId: '01'.repeat(16), name: 'v', hash: 'aa', instantNs: 1n };
    await c.recordTip({ ...tip, seq: 9 });
    await c.recordTip({ ...tip, seq: 8, hash: 'bb' });
    expect((await c.seenTips()).get(tip.volumeId)).toMatchObject({ seq: 9, hash: 'aa' });
    await c.forgetTip(tip.volumeId);
    expect((await c.seenTips()).size).toBe(0);
  });

  it.each(['garbage', 'cut', 'zeros', 'another version'])(
    'begins anew when its file is damaged (%s)',
    async (how) => {
      await using dir = tempDir();
      const path = cataloguePath(dir.path, ID);
      const first = await open(dir.path);
      for (let i = 0; i < 300; i++)
        await first.recordEvent({ kind: 'prune', content: { text: 'x'.repeat(500), i } });
      await first.close();
      const bytes = readFileSync(path);
      if (how === 'garbage') bytes.fill(0x5a, 0, 4096);
      if (how === 'zeros') bytes.fill(0, 4096, 4096 * 6);
      if (how === 'another version') bytes.writeUInt32BE(99, 60);
      writeFileSync(path, how === 'cut' ? bytes.subarray(0, 4096 + 17) : bytes);
      for (const end of ['-wal', '-shm']) await rm(path + end, { force: true });
      const warnings: string[] = [];
      await using again = await open(dir.path, warnings);
      expect(warnings).toHaveLength(1);
      expect(warnings[0]).toContain('begun anew');
      expect(await again.lastEvent('prune')).toBeUndefined();
      await again.recordEvent({ kind: 'prune', content: {} });
      expect(await again.lastEvent('prune')).toBeDefined();
      expect(readdirSync(dirname(path)).some((n) => n.includes('.damaged-'))).toBe(true);
    },
  );

  it('is used by two at once', async () => {
    await using dir = tempDir();
    await using a = await open(dir.path);
    await using b = await open(dir.path);
    await Promise.all(
      [a, b].flatMap((c, n) =>
        Array.from({ length: 20 }, (_, i) =>
          c.recordPacks([
            {
              packId: `${n}`.repeat(30) + String(i).padStart(2, '0'),
              generation: 0,
              sizeBytes: i,
              verifiedNs: undefined,
              damaged: false,
            },
          ]),
        ),
      ),
    );
    expect((await a.packs()).size).toBe(40);
    expect(await b.packs()).toEqual(await a.packs());
  });

  it('is opened by several at the same moment when there is none', async () => {
    await using dir = tempDir();
    // Which of them are in each other's way is chance. No more than libuv has threads: one that waits keeps its own.
    for (let round = 0; round < 12; round++) {
      const all = await Promise.all(Array.from({ length: 4 }, () => open(dir.join(`r${round}`))));
      await Promise.all(all.map((c, i) => c.recordEvent({ kind: 'verify', content: { i } })));
      for (const c of all) expect(await c.lastEvent('verify')).toBeDefined();
      await Promise.all(all.map((c) => c.close()));
    }
  });

  it('can be deleted, and what is rebuilt is the same', async () => {
    const store = new MemoryStore({ record: false });
    const { repo, model, writer } = await newModel(store, seeded(5), { sizeBytes: 64 * 1024 });
    model.mutate(5);
    await model.capture(writer, [...Array(16).keys()], true);
    await model.capture(writer, model.mutate(1));
    await writer.close();
    await addSnapshot(repo, {
      name: 'a snapshot',
      volumeId: model.volumeId,
      seq: 2,
      hash: 'ab',
      instantNs: 1_795_363_867_123_456_789n,
      pointClass: PointClass.crash,
      tags: ['x'],
      createdNs: 5n,
    });
    await repo.putObject(ObjectKind.tape, 'tapes/T1', { label: 'T1' });
    await using dir = tempDir();
    const first = await open(dir.path);
    await first.rebuild(repo);
    const before = await first.dump();
    await first.close();
    expect(before['volumes']).toHaveLength(1);
    expect(before['snapshots']).toHaveLength(1);
    expect(before['tapes']).toHaveLength(1);
    expect(before['tips']).toMatchObject([{ seq: 2 }]);
    await rm(dirname(cataloguePath(dir.path, ID)), { recursive: true });
    await using second = await open(dir.path);
    expect((await second.dump())['volumes']).toEqual([]);
    await second.rebuild(repo);
    expect(await second.dump()).toEqual(before);
    await second.rebuild(repo);
    expect(await second.dump()).toEqual(before);
  });

  it('says which file when it cannot be made', async () => {
    await using dir = tempDir();
    writeFileSync(dir.join('file'), '');
    chmodSync(dir.join('file'), 0o600);
    await expect(open(dir.join('file'))).rejects.toThrow(/file\/abab/);
  });
});

describe('a lenient catalogue', () => {
  it('tells once what it cannot write, and goes on', async () => {
    await using dir = tempDir();
    const told: string[] = [];
    const options = {
      cacheDir: dir.path,
      repositoryId: ID,
      clock: new SteppedClock(),
      warn: (m: string): void => void told.push(m),
    };
    await using strict = await Catalogue.open(options);
    await using lenient = await Catalogue.open({ ...options, lenient: true });
    // As the first write to a full disk: the transaction fails.
    const sqlite = createRequire(import.meta.url)('sqlite3') as typeof import('sqlite3');
    const db = await new Promise<import('sqlite3').Database>((done, failed) => {
      const opened = new sqlite.Database(cataloguePath(dir.path, ID), (error) =>
        error === null ? done(opened) : failed(error),
      );
    });
    await new Promise<void>((done, failed) => {
      db.exec('DROP TABLE events', (error) => (error === null ? done() : failed(error)));
    });
    await new Promise<void>((done) => db.close(() => done()));
    const event = { kind: 'verify', content: { damage: 1 } } as const;
    await expect(strict.recordEvent(event)).rejects.toMatchObject({ kind: 'io' });
    expect(told).toEqual([]);
    await lenient.recordEvent(event);
    await lenient.recordEvent(event);
    await lenient.recordConfig('one');
    expect(told).toHaveLength(1);
    expect(told[0]).toMatch(/no such table.*; what was seen of the repository is not remembered/);
    expect(await lenient.configs()).toEqual(['one']);
  });
});
