/**
 * The independent extractor on repositories that the real program made: what it gets out, from segments and journal and
 * from packs alone, is what b2 restores and what was on the device.
 */
import { existsSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { execFile } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { afterEach, describe, expect, it } from 'vitest';
import { systemClock, systemRandom } from '../../src/clock.js';
import type { KeyAddResult } from '../../src/commands/run/key-add.js';
import type { KeyListResult } from '../../src/commands/run/key-list.js';
import type { SnapshotAnswer } from '../../src/commands/run/snapshot.js';
import { currentIdentity } from '../../src/process-identity.js';
import { Repository } from '../../src/repo/repository.js';
import { openDirectoryStore } from '../../src/repo/store-directory.js';
import { packName } from '../../src/format/names.js';
import { prune } from '../../src/retention/prune.js';
import {
  Repository as ForeignRepository,
  extract,
  list,
  type Listing,
} from '../extractor/extract.mjs';
import { B2 } from '../support/b2.js';
import { noise, pokeWithDd } from '../support/disks.js';
import { sparseFile } from '../support/loop.js';
import { cmp, copySparse } from '../support/source.js';
import { tempDir, type TempDir } from '../support/tmp.js';

const EXTRACTOR = fileURLToPath(new URL('../extractor/extract.mjs', import.meta.url));
const KIB = 1024;
const MIB = 1024 * KIB;
const PASSWORD = 'correct horse';
const WAYS = [[], ['--packs-only']] as const;

const dirs: TempDir[] = [];
afterEach(async () => {
  for (const dir of dirs.splice(0)) await dir.remove();
});

interface Secret {
  readonly B2_PASSWORD?: string;
  readonly B2_KEY_FILE?: string;
}

async function extractor(secret: Secret, ...args: readonly string[]): Promise<string> {
  const env = { PATH: process.env['PATH'], ...secret };
  const { stdout } = await promisify(execFile)(process.execPath, [EXTRACTOR, ...args], { env });
  return stdout;
}

/** Extracts every reference both ways, with one start of the extractor each, and compares by cmp. */
function expectExtracted(
  dir: TempDir,
  repository: string,
  secret: Secret,
  volume: string,
  references: ReadonlyMap<number, string>,
): void {
  for (const packsOnly of [false, true]) {
    const foreign = new ForeignRepository(repository, {
      ...(secret.B2_PASSWORD === undefined ? {} : { password: secret.B2_PASSWORD }),
      ...(secret.B2_KEY_FILE === undefined ? {} : { keyMaterial: materialOf(secret.B2_KEY_FILE) }),
    });
    try {
      const found = list(foreign, packsOnly).volumes.find((v) => v.name === volume);
      expect(found?.points.map((p) => p.seq)).toEqual([...references.keys()]);
      for (const [seq, reference] of references) {
        const out = dir.join('extracted');
        extract(foreign, packsOnly, volume, String(seq), out, null);
        cmp(reference, out);
        rmSync(out);
      }
    } finally {
      foreign.close();
    }
  }
}

function materialOf(keyFile: string): Buffer {
  return Buffer.from(readFileSync(keyFile, 'ascii').trim().split(' ')[1] ?? '', 'hex');
}

/** An image of `sizeBytes` captured three times, changed in between; what each point must be, by number. */
async function threePoints(
  dir: TempDir,
  b2: B2,
  sizeBytes: number,
  volume = 'v',
): Promise<Map<number, string>> {
  const image = sparseFile(dir, `${volume}.img`, sizeBytes);
  const references = new Map<number, string>();
  for (const round of [1, 2, 3]) {
    if (round === 1) pokeWithDd(image, 0, noise(sizeBytes, Math.min(sizeBytes, 3 * MIB + 100)));
    if (round === 2) {
      pokeWithDd(image, 0, Buffer.alloc(Math.min(sizeBytes, 70_000)));
      pokeWithDd(image, Math.max(0, sizeBytes - 700), noise(2, Math.min(700, sizeBytes)));
    }
    if (round === 3)
      pokeWithDd(
        image,
        Math.floor(sizeBytes / 2),
        Buffer.from('text '.repeat(Math.min(40_000, Math.floor(sizeBytes / 10)))),
      );
    const { id } = await b2.json<SnapshotAnswer>(['snapshot', image, '--volume', volume]);
    const reference = dir.join(`${volume}-${round}`);
    copySparse(image, reference);
    references.set(Number(id.slice(1)), reference);
  }
  return references;
}

function newDir(): TempDir {
  const dir = tempDir();
  dirs.push(dir);
  return dir;
}

describe('the independent extractor', () => {
  it('reads a repository without encryption, whatever the size', async () => {
    const dir = newDir();
    const b2 = new B2(dir);
    await b2.json(['init', '--encryption', 'none']);
    const sizes = [512, 65_536 + 1, 8 * MIB + 4096];
    for (const [i, sizeBytes] of sizes.entries()) {
      const references = await threePoints(dir, b2, sizeBytes, `v${i}`);
      expectExtracted(dir, b2.repository, {}, `v${i}`, references);
    }
  });

  it.each(['16K', '256K'])('reads one with a password and chunks of %s', async (chunkSize) => {
    const dir = newDir();
    const b2 = new B2(dir, { B2_PASSWORD: PASSWORD });
    await b2.json(['init', '--chunk-size', chunkSize, '--pack-size', '1M']);
    const references = await threePoints(dir, b2, 6 * MIB + 5000);
    expectExtracted(dir, b2.repository, { B2_PASSWORD: PASSWORD }, 'v', references);
    await expect(extractor({ B2_PASSWORD: 'wrong' }, b2.repository, 'list')).rejects.toThrow();
  });

  it('reads one with a key file, before and after the keys are changed', async () => {
    const dir = newDir();
    const keyFile = dir.join('key');
    const b2 = new B2(dir, { B2_KEY_FILE: keyFile });
    await b2.json(['init']);
    const references = await threePoints(dir, b2, 5 * MIB);
    expectExtracted(dir, b2.repository, { B2_KEY_FILE: keyFile }, 'v', references);
    // The program by itself, as a person in need would run it.
    for (const way of WAYS) {
      const text = await extractor({ B2_KEY_FILE: keyFile }, b2.repository, 'list', ...way);
      expect((JSON.parse(text) as Listing).volumes[0]?.commits).toBe(3);
      const out = dir.join(`program-${way.length}`);
      await extractor(
        { B2_KEY_FILE: keyFile },
        b2.repository,
        'extract',
        'v',
        'latest',
        out,
        ...way,
      );
      cmp(references.get(3) ?? '', out);
    }

    const passwordFile = dir.join('password');
    writeFileSync(passwordFile, `${PASSWORD}\n`, { mode: 0o600 });
    await b2.json<KeyAddResult>(['key', 'add', '--new-password-file', passwordFile]);
    expectExtracted(dir, b2.repository, { B2_PASSWORD: PASSWORD }, 'v', references);
    const { keys } = await b2.json<KeyListResult>(['key', 'list']);
    const old = keys.find((k) => k.inUse)?.id ?? '';
    const other = new B2(dir, { B2_PASSWORD: PASSWORD });
    await other.json(['key', 'remove', old]);
    expectExtracted(dir, b2.repository, { B2_PASSWORD: PASSWORD }, 'v', references);
    await expect(extractor({ B2_KEY_FILE: keyFile }, b2.repository, 'list')).rejects.toThrow();
    expect((await b2.error(['points', 'v'])).code).toBe(12);
  });

  it('reads one after a prune that deleted and rewrote packs', async () => {
    const dir = newDir();
    const b2 = new B2(dir, { B2_PASSWORD: PASSWORD });
    await b2.json(['init', '--pack-size', '1M']);
    const references = await threePoints(dir, b2, 4 * MIB);
    // A volume whose history is gone: what only it used is garbage.
    const image = sparseFile(dir, 'gone.img', 3 * MIB);
    pokeWithDd(image, 0, noise(55, 3 * MIB));
    const { volumeId } = await b2.json<SnapshotAnswer>(['snapshot', image, '--volume', 'gone']);
    rmSync(`${b2.repository}/volumes/${volumeId}`, { recursive: true });

    const store = await openDirectoryStore(b2.repository);
    const secret = { kind: 'password', password: PASSWORD, source: 'the test' } as const;
    const env = { clock: systemClock, random: systemRandom, owner: currentIdentity() };
    let freed = 0;
    await using repo = await Repository.open(store, [secret], env);
    for (let run = 0; run < 3; run++) freed += (await prune(repo, { graceMs: 0 })).freedBytes;
    expect(freed).toBeGreaterThan(2 * MIB);
    expectExtracted(dir, b2.repository, { B2_PASSWORD: PASSWORD }, 'v', references);
    for (const [seq, reference] of references) {
      await b2.json(['restore', 'v', dir.join(`out-${seq}`), '--at', `#${seq}`]);
      cmp(reference, dir.join(`out-${seq}`));
    }
  });

  it('and b2 both refuse data that have changed, and write nothing', async () => {
    const dir = newDir();
    const b2 = new B2(dir, { B2_PASSWORD: PASSWORD });
    await b2.json(['init']);
    await threePoints(dir, b2, 4 * MIB);
    const packs: string[] = [];
    const store = await openDirectoryStore(b2.repository);
    for await (const { name } of store.list('packs')) packs.push(name);
    await store.close();
    for (const name of packs) {
      const path = `${b2.repository}/${name}`;
      if (statSync(path).size < 200_000) continue;
      expect(name).toBe(packName(name.slice(-32)));
      const bytes = readFileSync(path);
      bytes[150_000] = (bytes[150_000] ?? 0) ^ 1;
      writeFileSync(path, bytes);
    }
    const out = dir.join('out');
    for (const way of WAYS) {
      await expect(
        extractor({ B2_PASSWORD: PASSWORD }, b2.repository, 'extract', 'v', '1', out, ...way),
      ).rejects.toThrow();
      expect(existsSync(out)).toBe(false);
    }
    const error = await b2.error(['restore', 'v', out, '--at', '#1']);
    expect(error.code).toBe(5);
    expect(error.message).toMatch(/[0-9a-f]{32}/);
  });
});
