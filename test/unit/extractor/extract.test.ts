import {
  execFileSync,
  spawnSync,
  type ExecFileSyncOptionsWithStringEncoding,
} from 'node:child_process';
import {
  existsSync,
  mkdtempSync,
  readFileSync,
  readdirSync,
  rmSync,
  statSync,
  unlinkSync,
  writeFileSync,
} from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll, afterEach, beforeAll, describe, expect, it, vi } from 'vitest';
import { extract, ExtractError, list, Repository } from '../../extractor/extract.mjs';
import {
  BLOCK,
  CHUNK_BLOCKS,
  KEY_MATERIAL,
  PASSWORD,
  random,
  SyntheticPack,
  SyntheticRepo,
  SyntheticVolume,
  ZERO_HASH,
} from './synthetic.js';
import { memoryDir } from '../../support/tmp.js';

/** No key of the machine's own may help. */
const bareEnv = { PATH: process.env['PATH'] ?? '' };
const PROGRAM = join(dirname(fileURLToPath(import.meta.url)), '../../extractor/extract.mjs');
const WAYS = [
  ['segments and journal', false],
  ['packs only', true],
] as const;

let root = '';
let warnings = '';
beforeAll(() => {
  root = mkdtempSync(join(memoryDir(), 'b2-extractor-'));
});
afterAll(() => rmSync(root, { recursive: true, force: true }));
afterEach(() => {
  vi.restoreAllMocks();
});

function quiet(): void {
  warnings = '';
  vi.spyOn(process.stderr, 'write').mockImplementation((text) => {
    warnings += String(text);
    return true;
  });
}

let files = 0;
/** Extracts in this process; the image, or the error. */
function image(
  dir: string,
  packsOnly: boolean,
  volume: string,
  seq: string,
  snapshot: string | null = null,
): Buffer {
  const out = join(root, `out-${files++}`);
  const repo = new Repository(dir, { keyMaterial: KEY_MATERIAL });
  try {
    extract(repo, packsOnly, volume, seq, out, snapshot);
    return readFileSync(out);
  } finally {
    repo.close();
    rmSync(out, { force: true });
  }
}

function listing(dir: string, packsOnly: boolean): ReturnType<typeof list> {
  const repo = new Repository(dir, { keyMaterial: KEY_MATERIAL });
  try {
    return list(repo, packsOnly);
  } finally {
    repo.close();
  }
}

const MANY = 14;

/**
 * A volume of 14 commits in three sealed packs and one torn one: sizes that shrink, grow and end within a block, a full commit, dedupe
 * over packs and volumes, extents frames; overlapping segments, two maps and a journal; a stale writer's commits off the chain.
 */
function build(
  name: string,
  encrypted: boolean,
): { dir: string; repo: SyntheticRepo; volume: SyntheticVolume; packs: string[] } {
  const dir = join(root, name);
  const repo = new SyntheticRepo(dir, encrypted, encrypted ? 11 : 12);
  const volume = new SyntheticVolume(repo, 'disk', 100 * BLOCK);
  const other = new SyntheticVolume(repo, 'other', 40 * BLOCK);
  const packs: string[] = [];
  const fill = (work: (pack: SyntheticPack) => void): SyntheticPack => {
    const pack = new SyntheticPack(repo);
    packs.push(pack.name);
    work(pack);
    return pack;
  };
  const sealed = (work: (pack: SyntheticPack) => void): void => {
    const pack = fill(work);
    pack.footer();
    pack.put();
  };
  sealed((pack) => {
    volume.commit(pack, { full: true });
    other.commit(pack, { full: true });
    volume.commit(pack);
    volume.commit(pack, { size: 60 * BLOCK + 512 });
    volume.commit(pack, { size: 110 * BLOCK + 1024, class: 0 });
  });
  sealed((pack) => {
    volume.commit(pack);
    volume.commit(pack, { full: true });
    other.commit(pack);
    volume.commit(pack);
    volume.commit(pack);
    // sealed by somebody else, behind torn bytes
    pack.junk(Buffer.from('torn'));
  });
  sealed((pack) => {
    volume.commit(pack);
    volume.commit(pack, { epoch: 2 });
    volume.commit(pack, { epoch: 2 });
  });
  // a stale writer of epoch 1 went on behind commit 9
  sealed((pack) => {
    const prev = volume.commits[8]?.hash ?? ZERO_HASH;
    let last = prev;
    for (let seq = 10; seq < 20; seq++) {
      const { extents } = volume.changes(pack, seq, 100 * BLOCK);
      last = pack.commit(volume.id, { seq, prev: last, size: 100 * BLOCK, epoch: 1, extents }).hash;
    }
  });
  const lastSealed = volume.commits[10]?.pack ?? '';
  const open = fill((pack) => {
    volume.commit(pack, { epoch: 2 });
    volume.commit(pack, { epoch: 2 });
    // somebody sealed it, the writer went on behind
    pack.footer();
    volume.commit(pack, { epoch: 2 });
    pack.junk(Buffer.from('B2FR, but torn'));
  });
  open.put();
  volume.journal(lastSealed);
  volume.journal(open.id);
  volume.journal('ff'.repeat(16));
  repo.put(`packs/0a/${'0a'.repeat(16)}`, Buffer.alloc(64));
  repo.put('packs/0b/.tmp-1', Buffer.from('ignored'));
  volume.delta(0, 1, 3);
  volume.delta(0, 4, 4);
  volume.delta(1, 1, 4);
  volume.delta(0, 5, 7);
  volume.delta(0, 8, 10);
  volume.fullMap(4);
  volume.fullMap(8);
  other.delta(0, 1, 2);
  other.fullMap(2);
  repo.snapshot(volume.id, 'before the update', volume.commits[6] ?? volume.commits[0]!);
  return { dir, repo, volume, packs };
}

describe.each([
  ['encrypted', true],
  ['without encryption', false],
] as const)('a repository %s', (kind, encrypted) => {
  let built: ReturnType<typeof build>;
  beforeAll(() => {
    built = build(kind.replaceAll(' ', '-'), encrypted);
  });

  it.each(WAYS)('gives back every state: %s', (_way, packsOnly) => {
    quiet();
    expect(built.volume.commits.length).toBe(MANY);
    for (const [seq, state] of built.volume.states) {
      const got = image(built.dir, packsOnly, 'disk', String(seq));
      expect(got.length, `size of commit ${seq}`).toBe(state.size);
      expect(got.equals(state.image()), `commit ${seq}`).toBe(true);
    }
    expect(image(built.dir, packsOnly, 'disk', 'latest').equals(built.volume.model.image())).toBe(
      true,
    );
    expect(warnings).toContain('reading ended at offset');
    expect(warnings.includes('counts as empty')).toBe(packsOnly);
  });

  it('lists the same both ways', () => {
    quiet();
    const [a, b] = [listing(built.dir, true), listing(built.dir, false)];
    expect(a).toEqual(b);
    const disk = a.volumes.find((v) => v.name === 'disk');
    expect(disk?.commits).toBe(MANY);
    expect(disk?.points.map((p) => p.seq)).toEqual([1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]);
    expect(disk?.tip?.hash).toBe(built.volume.commits.at(-1)?.hash);
    expect(disk?.snapshots.map((s) => s.name)).toEqual(['before the update']);
    expect(warnings).toContain('the pack does not exist');
  });

  it.each(WAYS)('finds a snapshot: %s', (_way, packsOnly) => {
    quiet();
    const got = image(built.dir, packsOnly, built.volume.id, 'latest', 'before the update');
    expect(got.equals(built.volume.states.get(7)?.image() ?? Buffer.alloc(0))).toBe(true);
    expect(() => image(built.dir, packsOnly, 'disk', '3', 'before the update')).toThrow(
      /commit 7, not 3/,
    );
    expect(() => image(built.dir, packsOnly, 'disk', 'latest', 'no such')).toThrow(/no snapshot/);
  });

  it.each(WAYS)('says what is not there: %s', (_way, packsOnly) => {
    quiet();
    expect(() => image(built.dir, packsOnly, 'disk', '99')).toThrow(/no commit 99/);
    expect(() => image(built.dir, packsOnly, 'nobody', '1')).toThrow(/no volume/);
  });

  it.each(WAYS)('never gives a wrong image for a changed byte: %s', (_way, packsOnly) => {
    quiet();
    const next = random(77);
    const objects = readdirSync(built.dir, { recursive: true, withFileTypes: true })
      .filter((e) => e.isFile())
      .map((e) => join(e.parentPath, e.name))
      .sort();
    const expected = new Map([...built.volume.states].map(([seq, state]) => [seq, state.image()]));
    let found = 0;
    for (let round = 0; round < 100; round++) {
      const path = objects[Math.floor(next() * objects.length)] ?? '';
      const good = readFileSync(path);
      const bad = Buffer.from(good);
      if (next() < 0.1) writeFileSync(path, bad.subarray(0, Math.floor(next() * bad.length)));
      else {
        const at =
          next() < 0.3
            ? Math.floor(next() * Math.min(200, bad.length))
            : Math.floor(next() * bad.length);
        bad[at] = (bad[at] ?? 0) ^ (1 << Math.floor(next() * 8));
        writeFileSync(path, bad);
      }
      const seq = 1 + Math.floor(next() * MANY);
      try {
        const got = image(built.dir, packsOnly, built.volume.id, String(seq));
        expect(
          got.equals(expected.get(seq) ?? Buffer.alloc(0)),
          `${path}, commit ${seq}, round ${round}`,
        ).toBe(true);
      } catch (error) {
        if (!(error instanceof ExtractError)) throw error;
        found++;
      } finally {
        writeFileSync(path, good);
      }
    }
    expect(found).toBeGreaterThan(8);
  });

  it('finds an object in the place of another', () => {
    quiet();
    const meta = join(built.dir, `volumes/${built.volume.id}/meta`);
    const good = readFileSync(meta);
    const others = readdirSync(join(built.dir, 'volumes')).filter((v) => v !== built.volume.id);
    writeFileSync(meta, readFileSync(join(built.dir, `volumes/${others[0] ?? ''}/meta`)));
    expect(() => listing(built.dir, true)).toThrow(/meta, offset 48: the seal does not open/);
    writeFileSync(meta, good);
  });

  it('names object and offset of damage, by either way', () => {
    quiet();
    const path = join(built.dir, built.packs[0] ?? '');
    const good = readFileSync(path);
    const bad = Buffer.from(good);
    bad[64 + 32 + 60] = (bad[64 + 32 + 60] ?? 0) ^ 1;
    writeFileSync(path, bad);
    for (const [, packsOnly] of WAYS) {
      expect(() => image(built.dir, packsOnly, 'disk', '1')).toThrow(
        `${built.packs[0] ?? ''}, offset 64: the seal of frame 0 does not open`,
      );
    }
    writeFileSync(path, good);
  });

  it('finds a missing pack, segment and commit', () => {
    quiet();
    const path = join(built.dir, built.packs[1] ?? '');
    const good = readFileSync(path);
    unlinkSync(path);
    expect(() => image(built.dir, true, 'disk', '14')).toThrow(/the chain is broken: commit 9/);
    expect(() => image(built.dir, false, 'disk', '8')).toThrow(/the pack is missing/);
    writeFileSync(path, good);
    const folder = join(built.dir, `volumes/${built.volume.id}/manifest`);
    const segment = join(
      folder,
      readdirSync(folder).find((s) => s.startsWith('00-0000000000000005')) ?? '',
    );
    const kept = readFileSync(segment);
    unlinkSync(segment);
    expect(() => image(built.dir, false, 'disk', '14')).toThrow(
      /no segment covers commit 5|does not follow/,
    );
    writeFileSync(segment, kept);
  });

  it('uses config.copy when config is damaged, and says so', () => {
    quiet();
    const path = join(built.dir, 'config');
    const good = readFileSync(path);
    writeFileSync(path, good.toString().replace('chunkBytes: 16384', 'chunkBytes: 32768'));
    expect(listing(built.dir, true).repository.chunkBytes).toBe(16384);
    expect(warnings).toMatch(/MAC is wrong.*config\.copy was used/);
    unlinkSync(path);
    expect(listing(built.dir, true).repository.chunkBytes).toBe(16384);
    writeFileSync(path, good.toString().replace('version: 1', 'version: 2'));
    const copy = join(built.dir, 'config.copy');
    writeFileSync(copy, readFileSync(path));
    expect(() => listing(built.dir, true)).toThrow(/version 2 of the format/);
    writeFileSync(path, good);
    writeFileSync(copy, good);
  });
});

describe('the program', () => {
  it('lists and extracts, with passphrase and with key file, and leaves holes', () => {
    const { dir, volume } = build('program', true);
    const env = { ...bareEnv, B2_PASSWORD: PASSWORD.normalize('NFD') };
    const quietly: ExecFileSyncOptionsWithStringEncoding = {
      env,
      encoding: 'utf8',
      stdio: ['ignore', 'pipe', 'ignore'],
    };
    const listed: unknown = JSON.parse(
      execFileSync(process.execPath, [PROGRAM, dir, 'list'], quietly),
    );
    expect(listed).toMatchObject({
      volumes: expect.arrayContaining([expect.objectContaining({ name: 'disk', commits: MANY })]),
    });
    const out = join(root, 'program.img');
    execFileSync(
      process.execPath,
      [PROGRAM, dir, 'extract', 'disk', '5', out, '--packs-only'],
      quietly,
    );
    expect(readFileSync(out).equals(volume.states.get(5)?.image() ?? Buffer.alloc(0))).toBe(true);
    const again = spawnSync(process.execPath, [PROGRAM, dir, 'extract', 'disk', '5', out], {
      env,
      encoding: 'utf8',
    });
    expect(again.status).toBe(1);
    expect(again.stderr).toContain('exists already');
    const keyFile = join(root, 'key');
    writeFileSync(keyFile, `b2-key-v1 ${KEY_MATERIAL.toString('hex')}\n`, { mode: 0o600 });
    const withFile = spawnSync(process.execPath, [PROGRAM, dir, 'list'], {
      env: { ...bareEnv, B2_KEY_FILE: keyFile },
      encoding: 'utf8',
    });
    expect(withFile.status).toBe(0);
    const wrong = spawnSync(process.execPath, [PROGRAM, dir, 'list'], {
      env: { ...bareEnv, B2_PASSWORD: 'wrong' },
      encoding: 'utf8',
    });
    expect(wrong.status).toBe(1);
    expect(wrong.stderr).toContain('opens none of the keys');
    expect(wrong.stderr).not.toMatch(/ at .*\.mjs/);
    expect(readdirSync(root).filter((name) => name.includes('.partial'))).toEqual([]);
  });

  it('leaves no file behind when something is wrong', () => {
    const { dir, packs } = build('program-damaged', false);
    const path = join(dir, packs[0] ?? '');
    const bytes = readFileSync(path);
    bytes[200] = (bytes[200] ?? 0) ^ 1;
    writeFileSync(path, bytes);
    const out = join(root, 'damaged.img');
    const run = spawnSync(process.execPath, [PROGRAM, dir, 'extract', 'disk', '1', out], {
      env: bareEnv,
      encoding: 'utf8',
    });
    expect(run.status).toBe(1);
    expect(run.stderr).toContain(`${packs[0] ?? ''}, offset 64`);
    expect(existsSync(out)).toBe(false);
    expect(readdirSync(root).filter((name) => name.includes('.partial'))).toEqual([]);
  });
});

it('handles the ends of a GiB and leaves the rest a hole', () => {
  const dir = join(root, 'regions');
  const repo = new SyntheticRepo(dir, false, 3);
  const size = 3 * 2 ** 30 + 512;
  const volume = new SyntheticVolume(repo, 'big', size);
  const pack = new SyntheticPack(repo);
  const data = Buffer.alloc(2 * BLOCK, 1);
  const tail = Buffer.alloc(512, 2);
  const frame = pack.chunks([data, tail]);
  const edge = 262_144;
  const extents = [
    { block: edge - 1, count: 1, seq: 1, pack: pack.id, frame, sub: 0, skip: 0 },
    { block: edge, count: 1, seq: 1, pack: pack.id, frame, sub: 0, skip: 1 },
    { block: edge * 3, count: 1, seq: 1, pack: pack.id, frame, sub: 1, skip: 0 },
  ];
  const commit = pack.commit(volume.id, { seq: 1, prev: ZERO_HASH, full: true, size, extents });
  volume.commits.push(commit);
  pack.footer();
  pack.put();
  volume.delta(0, 1, 1);
  for (const [, packsOnly] of WAYS) {
    const out = join(root, `regions-${String(packsOnly)}.img`);
    const reader = new Repository(dir, {});
    extract(reader, packsOnly, 'big', 'latest', out, null);
    reader.close();
    const facts = statSync(out);
    expect(facts.size).toBe(size);
    expect(facts.blocks * 512).toBeLessThan(64 * BLOCK);
    const tool = execFileSync(
      'od',
      ['-An', '-tx1', '-j', String(2 ** 30 - BLOCK - 1), '-N', String(2 * BLOCK + 2), out],
      { encoding: 'utf8' },
    );
    expect(tool.trim().startsWith('00 01 01')).toBe(true);
    expect(tool.trim().endsWith('01 00')).toBe(true);
    const end = execFileSync('od', ['-An', '-tx1', '-v', '-j', String(3 * 2 ** 30 - 1), out], {
      encoding: 'utf8',
    });
    expect(end.replace(/\s+/g, '')).toBe(`00${'02'.repeat(512)}`);
    unlinkSync(out);
  }
});

describe('merged commits', () => {
  /**
   * Commits 1 to 6; then 2 to 4 merged, with the originals still there or not. With `inJournal` segments reach to commit 3
   * only, so that the merged commit, in the journal, reaches back into them.
   */
  function merge(
    name: string,
    keepOriginals: boolean,
    inJournal: boolean,
  ): { dir: string; volume: SyntheticVolume } {
    const dir = join(root, name);
    const repo = new SyntheticRepo(dir, true, 21);
    const volume = new SyntheticVolume(repo, 'disk', 80 * BLOCK);
    const data = new SyntheticPack(repo);
    const holder = new SyntheticPack(repo);
    const shadow = keepOriginals ? holder : new SyntheticPack(repo);
    volume.commit(holder, { full: true });
    // the originals' chunks go to `data`, their commits to where they may vanish with it
    const originals = [2, 3, 4].map((seq) => {
      const { extents, bytes } = volume.changes(data, seq, volume.model.size);
      const commit = shadow.commit(volume.id, {
        seq,
        prev: volume.commits.at(-1)?.hash ?? ZERO_HASH,
        size: volume.model.size,
        extents,
      });
      volume.commits.push(commit);
      const model = volume.model.clone();
      extents.forEach((e, i) => {
        for (let k = 0; k < e.count; k++) {
          const content = bytes[i];
          const at = e.skip + k;
          const run = e.skip + e.count > CHUNK_BLOCKS;
          const place = {
            frame: e.frame + (run ? Math.floor(at / CHUNK_BLOCKS) : 0),
            skip: run ? at % CHUNK_BLOCKS : at,
          };
          const source = e.pack === null ? e : { ...e, ...place };
          model.blocks.set(e.block + k, {
            bytes: content?.subarray(k * BLOCK, (k + 1) * BLOCK) ?? Buffer.alloc(BLOCK),
            source: { ...source, block: e.block + k, count: 1 },
          });
        }
      });
      volume.model = model;
      volume.states.set(seq, model);
      return commit;
    });
    const replaced = new Set(
      originals.flatMap((c) =>
        c.extents.flatMap((e) => Array.from({ length: e.count }, (_, k) => e.block + k)),
      ),
    );
    const extents = [...replaced]
      .sort((a, b) => a - b)
      .flatMap((block) => {
        const source = volume.model.blocks.get(block)?.source;
        return source === undefined ? [] : [{ ...source, block, count: 1 }];
      });
    const merged = holder.commit(volume.id, {
      seq: 4,
      first: 2,
      prev: volume.commits[0]?.hash ?? ZERO_HASH,
      standsFor: originals[2]?.hash ?? ZERO_HASH,
      size: volume.model.size,
      extents,
    });
    volume.commit(holder);
    volume.commit(holder);
    for (const pack of [data, holder]) {
      pack.footer();
      pack.put();
    }
    const kept = [volume.commits[0], merged, volume.commits[4], volume.commits[5]].filter(
      (c) => c !== undefined,
    );
    if (keepOriginals) volume.delta(0, 1, 3);
    if (inJournal) volume.journal(holder.id);
    else volume.delta(1, 1, 6, kept);
    return { dir, volume };
  }

  it.each([
    ['gone', false, false],
    ['still there', true, false],
    ['still there and in a segment before the journal', true, true],
  ] as const)('count for the commits they stand for, which are %s', (what, keep, inJournal) => {
    const { dir, volume } = merge(`merged ${what}`, keep, inJournal);
    for (const [, packsOnly] of WAYS) {
      for (const seq of [1, 4, 5, 6]) {
        expect(
          image(dir, packsOnly, 'disk', String(seq)).equals(
            volume.states.get(seq)?.image() ?? Buffer.alloc(0),
          ),
          `commit ${seq}`,
        ).toBe(true);
      }
      expect(() => image(dir, packsOnly, 'disk', '3')).toThrow(/merged into commit 4/);
      expect(listing(dir, packsOnly).volumes[0]?.points.map((p) => [p.first, p.seq])).toEqual([
        [1, 1],
        [2, 4],
        [5, 5],
        [6, 6],
      ]);
    }
  });
});

describe('chains', () => {
  /** A repository with one volume whose commits `work` writes into one sealed pack with a journal entry. */
  function chain(
    name: string,
    work: (pack: SyntheticPack, volume: SyntheticVolume) => void,
  ): string {
    const dir = join(root, name);
    const repo = new SyntheticRepo(dir, false, 31);
    const volume = new SyntheticVolume(repo, 'disk', 4 * BLOCK);
    const pack = new SyntheticPack(repo);
    work(pack, volume);
    pack.footer();
    pack.put();
    volume.journal(pack.id);
    return dir;
  }
  const bare = (
    seq: number,
    prev: string,
    epoch: number,
    size = 4 * BLOCK,
  ): Parameters<SyntheticPack['commit']>[1] => ({ seq, prev, epoch, size, extents: [] });

  it.each(WAYS)(
    'the highest epoch decides, even where it goes on from an older writer: %s',
    (_way, packsOnly) => {
      // epoch 3 extends what epoch 1 wrote; a commit of epoch 2 became visible later
      const dir = chain(`epochs-${String(packsOnly)}`, (pack, volume) => {
        const a = pack.commit(volume.id, bare(1, ZERO_HASH, 1));
        const b = pack.commit(volume.id, bare(2, a.hash, 1));
        pack.commit(volume.id, bare(3, b.hash, 3));
        const late = pack.commit(volume.id, { ...bare(2, a.hash, 2), size: 8 * BLOCK });
        pack.commit(volume.id, bare(3, late.hash, 2));
        pack.commit(volume.id, bare(4, 'ab'.repeat(32), 2));
      });
      expect(listing(dir, packsOnly).volumes[0]?.points.map((p) => [p.seq, p.epoch])).toEqual([
        [1, 1],
        [2, 1],
        [3, 3],
      ]);
    },
  );

  it.each(WAYS)('a broken chain is found: %s', (_way, packsOnly) => {
    const lost = chain(`lost-${String(packsOnly)}`, (pack, volume) => {
      pack.commit(volume.id, bare(1, ZERO_HASH, 1));
      pack.commit(volume.id, bare(2, 'cd'.repeat(32), 1));
    });
    expect(() => listing(lost, packsOnly)).toThrow(/follows commit 1 cdcd.*nowhere/);
    const fork = chain(`fork-${String(packsOnly)}`, (pack, volume) => {
      const a = pack.commit(volume.id, bare(1, ZERO_HASH, 1));
      pack.commit(volume.id, bare(2, a.hash, 1));
      pack.commit(volume.id, bare(2, a.hash, 1, 8 * BLOCK));
    });
    expect(() => listing(fork, packsOnly)).toThrow(/two different commits of one epoch/);
    const falling = chain(`falling-${String(packsOnly)}`, (pack, volume) => {
      const a = pack.commit(volume.id, bare(1, ZERO_HASH, 2));
      const b = pack.commit(volume.id, bare(2, a.hash, 1));
      pack.commit(volume.id, bare(3, b.hash, 2));
    });
    expect(() => listing(falling, packsOnly)).toThrow(/lower epoch than the commit before/);
  });

  it('a segment that does not lead on is found', () => {
    const dir = chain('foreign', (pack, volume) => {
      const a = pack.commit(volume.id, { ...bare(1, ZERO_HASH, 1), full: true });
      const b = pack.commit(volume.id, bare(2, a.hash, 1));
      const c = pack.commit(volume.id, bare(3, 'ef'.repeat(32), 1));
      volume.delta(0, 1, 2, [a, b]);
      volume.delta(0, 3, 3, [c]);
    });
    expect(() => listing(dir, false)).toThrow(/does not follow/);
  });

  it('a device that grows must name its new blocks, lest something of before shows again', () => {
    const build = (name: string, named: number): { dir: string; volume: SyntheticVolume } => {
      let volume: SyntheticVolume | undefined;
      const dir = chain(name, (pack, v) => {
        volume = v;
        const frame = pack.chunks([Buffer.alloc(4 * BLOCK, 1)]);
        const extents = [{ block: 0, count: 4, seq: 1, pack: pack.id, frame, sub: 0, skip: 0 }];
        const zeros = { block: 1, count: named, seq: 3, pack: null, frame: 0, sub: 0, skip: 0 };
        const a = pack.commit(v.id, { ...bare(1, ZERO_HASH, 1), full: true, extents });
        const b = pack.commit(v.id, bare(2, a.hash, 1, BLOCK + 512));
        const c = pack.commit(v.id, { ...bare(3, b.hash, 1, 4 * BLOCK), extents: [zeros] });
        v.commits.push(a, b, c);
      });
      if (volume === undefined) throw new Error('no volume');
      return { dir, volume };
    };
    const good = build('grown', 3);
    const expected = Buffer.concat([Buffer.alloc(BLOCK, 1), Buffer.alloc(3 * BLOCK)]);
    const bad = build('grown-badly', 2);
    for (let round = 0; round < 2; round++) {
      for (const [, packsOnly] of WAYS) {
        expect(image(good.dir, packsOnly, 'disk', '3').equals(expected)).toBe(true);
        expect(() => image(bad.dir, packsOnly, 'disk', '3')).toThrow(
          /commit 3 grew the device but leaves out 1 of the blocks 1 to 3/,
        );
      }
      // the first time through the journal, then through a segment
      good.volume.delta(0, 1, 3);
      bad.volume.delta(0, 1, 3);
    }
  });
});
