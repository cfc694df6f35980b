import { describe, expect, it } from 'vitest';
import { keyFileText, makeKey, parseKeyFile, type Secret } from '../../../src/repo/keys.js';
import { Repository, DEFAULT_PARAMETERS } from '../../../src/repo/repository.js';
import {
  addSnapshot,
  findVolume,
  listSnapshots,
  listVolumes,
  writeVolumeMeta,
} from '../../../src/repo/volume.js';
import { CHEAP, PASSWORD, seeded, testEnvironment, testMeta } from '../../support/model-volume.js';
import { MemoryStore } from '../../support/store-memory.js';

const env = () => testEnvironment(seeded(5));
const FILE: Secret = { kind: 'keyFile', material: Buffer.alloc(32, 8), source: '/root/key' };
const WRONG: Secret = { kind: 'password', password: 'wrong', source: 'B2_PASSWORD' };

async function newRepository(): Promise<{ store: MemoryStore; repo: Repository }> {
  const store = new MemoryStore();
  return { store, repo: await Repository.init(store, DEFAULT_PARAMETERS, PASSWORD, env(), CHEAP) };
}

describe('Repository', () => {
  it('opens with the right password only, and never says what was tried', async () => {
    const { store, repo } = await newRepository();
    expect((await Repository.open(store, [PASSWORD], env())).id).toBe(repo.id);
    const failure = await Repository.open(store, [WRONG], env()).catch((e: unknown) => e);
    expect(failure).toMatchObject({ kind: 'wrong-key', code: 12 });
    expect(JSON.stringify(failure)).not.toContain('"wrong"');
    expect(String(failure)).toContain('B2_PASSWORD');
    await expect(Repository.open(store, [], env())).rejects.toMatchObject({ kind: 'wrong-key' });
    await expect(Repository.open(store, [FILE], env())).rejects.toMatchObject({
      kind: 'wrong-key',
    });
  });

  it('is not made twice, and not found where there is none', async () => {
    const { store } = await newRepository();
    await expect(
      Repository.init(store, DEFAULT_PARAMETERS, PASSWORD, env(), CHEAP),
    ).rejects.toMatchObject({
      kind: 'exists',
      code: 10,
    });
    await expect(Repository.open(new MemoryStore(), [PASSWORD], env())).rejects.toMatchObject({
      kind: 'no-repository',
      code: 10,
    });
    // With only the copy left it is still there.
    await store.delete('config');
    await expect(
      Repository.init(store, DEFAULT_PARAMETERS, PASSWORD, env(), CHEAP),
    ).rejects.toMatchObject({ kind: 'exists' });
  });

  it('two inits at once make one repository', async () => {
    const store = new MemoryStore();
    const both = await Promise.allSettled([
      Repository.init(store, DEFAULT_PARAMETERS, PASSWORD, testEnvironment(seeded(1)), CHEAP),
      Repository.init(store, DEFAULT_PARAMETERS, PASSWORD, testEnvironment(seeded(2)), CHEAP),
    ]);
    expect(both.filter((b) => b.status === 'fulfilled')).toHaveLength(1);
    await Repository.open(store, [PASSWORD], env());
  });

  it('several keys open it, a removed one does not, the last one stays', async () => {
    const { store, repo } = await newRepository();
    const added = await repo.addKey(FILE, 'safe');
    const other = await Repository.open(store, [FILE], env());
    expect(other.keyId).toBe(added.id);
    // Two open repositories change keys one after the other: neither loses the other's change.
    await other.addKey({ ...WRONG, password: 'third' }, 'third', CHEAP);
    const removed = await repo.removeKey(repo.keyId);
    expect(removed.label).toBe('password');
    expect(repo.config.keys).toHaveLength(2);
    await expect(Repository.open(store, [PASSWORD], env())).rejects.toMatchObject({
      kind: 'wrong-key',
    });
    const third = await Repository.open(store, [{ ...WRONG, password: 'third' }], env());
    await expect(third.removeKey('zzzz')).rejects.toMatchObject({ kind: 'not-found' });
    await third.removeKey(added.id);
    await expect(third.removeKey(third.keyId.slice(0, 8))).rejects.toMatchObject({
      kind: 'refused',
    });
    expect(Buffer.compare(await store.get('config'), await store.get('config.copy'))).toBe(0);
  });

  it('finds every change of its configuration and falls back to the copy', async () => {
    const { store, repo } = await newRepository();
    const whole = await store.get('config');
    let fellBack = 0;
    for (let at = 0; at < whole.length; at += 3) {
      const bad = Buffer.from(whole);
      bad[at] = (bad[at] ?? 0) ^ 2;
      await store.put('config', bad);
      const warnings: string[] = [];
      const opened = await Repository.open(store, [PASSWORD], env(), (w) => warnings.push(w)).catch(
        (e: unknown) => e,
      );
      if (opened instanceof Repository) {
        expect(opened.config).toEqual(repo.config);
        if (warnings.length > 0) fellBack++;
      } else {
        // A change that only makes the password fail (the salt, say) looks like a wrong password: still nothing wrong is opened.
        expect(opened).toMatchObject({ name: 'B2Error' });
      }
    }
    expect(fellBack).toBeGreaterThan(50);
    await store.put('config', Buffer.from('rubbish'));
    await store.put('config.copy', Buffer.from('rubbish'));
    await expect(Repository.open(store, [PASSWORD], env())).rejects.toMatchObject({
      kind: 'damaged',
      code: 5,
    });
  });

  it('without encryption needs no secret and has no keys to change', async () => {
    const store = new MemoryStore();
    await Repository.init(store, { ...DEFAULT_PARAMETERS, encryption: 'none' }, undefined, env());
    const repo = await Repository.open(store, [], env());
    await expect(repo.addKey(FILE, 'x')).rejects.toMatchObject({ kind: 'unsupported' });
    await expect(repo.removeKey('x')).rejects.toMatchObject({ kind: 'unsupported' });
  });
});

describe('keys', () => {
  it('the same password in another Unicode form is the same', async () => {
    const store = new MemoryStore();
    const composed: Secret = { kind: 'password', password: 'caf\u00e9', source: 'x' };
    await Repository.init(store, DEFAULT_PARAMETERS, composed, env(), CHEAP);
    await Repository.open(store, [{ ...composed, password: 'cafe\u0301' }], env());
  });

  it('key files go round and other files are refused', () => {
    const material = Buffer.alloc(32, 0xa5);
    expect(Buffer.from(parseKeyFile(keyFileText(material), 'k')).equals(material)).toBe(true);
    for (const text of [
      '',
      'b2-key-v1 abc\n',
      `b2-key-v1 ${'A'.repeat(64)}\n`,
      `${keyFileText(material)}x`,
    ]) {
      expect(() => parseKeyFile(text, '/etc/b2/key')).toThrowError(/\/etc\/b2\/key/);
    }
  });

  it('two wrapped copies of one master key have nothing in common', async () => {
    const about = {
      label: 'x',
      created: '2026-01-01T00:00:00.000Z',
      random: testEnvironment(seeded(3)).random,
      cost: CHEAP,
    };
    const master = Buffer.alloc(32, 1);
    const a = await makeKey(master, 'ab'.repeat(16), PASSWORD, about);
    const b = await makeKey(master, 'ab'.repeat(16), PASSWORD, about);
    if (a.kind !== 'scrypt' || b.kind !== 'scrypt') throw new Error('not password keys');
    expect(a.salt).not.toBe(b.salt);
    expect(a.wrapped).not.toBe(b.wrapped);
  });
});

describe('volumes and snapshots', () => {
  it('are found by what people call them', () => {
    const list = [
      testMeta('11'.repeat(16), 1, 'web1/sda'),
      testMeta('22'.repeat(16), 1, 'web2/sda'),
      { ...testMeta('33'.repeat(16), 1, 'web2/sdb'), device: '/dev/sdb' },
    ];
    expect(findVolume(list, 'web1/sda').id).toBe('11'.repeat(16));
    expect(findVolume(list, '222222').id).toBe('22'.repeat(16));
    expect(findVolume(list, 'sdb').name).toBe('web2/sdb');
    expect(findVolume(list, '/dev/sdb').name).toBe('web2/sdb');
    expect(() => findVolume(list, 'sda')).toThrowError(expect.objectContaining({ kind: 'usage' }));
    expect(() => findVolume(list, 'nope')).toThrowError(
      expect.objectContaining({ kind: 'not-found', code: 4 }),
    );
  });

  it('names are unique in a volume, and damaged ones are told', async () => {
    const { store, repo } = await newRepository();
    const id = repo.newId();
    await writeVolumeMeta(repo, testMeta(id, 4096));
    const s = {
      name: 'été 1',
      volumeId: id,
      seq: 3,
      hash: 'aa',
      instantNs: 9n,
      pointClass: 2 as const,
      tags: ['x'],
      createdNs: 1n,
    };
    await addSnapshot(repo, s);
    await expect(addSnapshot(repo, { ...s, seq: 4 })).rejects.toMatchObject({ kind: 'exists' });
    await addSnapshot(repo, { ...s, name: 'b', seq: 2 });
    const warnings: string[] = [];
    expect(
      (await listSnapshots(repo, id, (w) => warnings.push(w))).map((x) => [
        x.name,
        x.seq,
        x.pointClass,
      ]),
    ).toEqual([
      ['b', 2, 'crash'],
      ['été 1', 3, 'crash'],
    ]);
    for (const bad of ['', ' a', 'a/b', '#1', 'a\nb', 'x'.repeat(201)]) {
      await expect(addSnapshot(repo, { ...s, name: bad })).rejects.toMatchObject({ kind: 'usage' });
    }
    for await (const { name } of store.list(`volumes/${id}/snapshots`))
      await store.put(name, Buffer.from('x'));
    expect(await listSnapshots(repo, id, (w) => warnings.push(w))).toEqual([]);
    expect(warnings).toHaveLength(2);
    await store.delete(`volumes/${id}/meta`);
    const [lost] = await listVolumes(repo, (w) => warnings.push(w));
    expect(lost?.name).toBe(`lost-${id}`);
  });
});
