/**
 * The conformance suite of the Store contract (src/repo/store.ts). Every implementation and every wrapper runs it.
 */
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { isKind } from '../../src/errors.js';
import { alignedMemory } from '../../src/memory.js';
import type { Appender, Store } from '../../src/repo/store.js';

export interface StoreFixture {
  readonly store: Store;
  /** Another client of the same place. The suite closes it. */
  another(): Promise<Store>;
  cleanup(): Promise<void>;
}

const MIB = 1024 * 1024;

/** Bytes that differ from place to place and from `seed` to `seed`. */
export function patterned(length: number, seed = 1): Buffer {
  const bytes = Buffer.alloc(length);
  let state = seed * 2654435761 + 1;
  for (let i = 0; i < length; i++) {
    state = (Math.imul(state, 1664525) + 1013904223) | 0;
    bytes[i] = state >>> 24;
  }
  return bytes;
}

async function namesOf(store: Store, prefix: string): Promise<string[]> {
  const names: string[] = [];
  for await (const { name } of store.list(prefix)) names.push(name);
  return names.sort();
}

async function* partsOf(...parts: Uint8Array[]): AsyncIterable<Uint8Array> {
  yield* parts;
}

export interface StoreSupports {
  /** Whether `openAppend` must work, or must say `unsupported`. Default true. */
  readonly append?: boolean;
}

export function storeSuite(
  title: string,
  makeStore: () => Promise<StoreFixture>,
  supports: StoreSupports = {},
): void {
  const canAppend = supports.append ?? true;
  describe(`${title} keeps the contract of Store`, () => {
    let fixture: StoreFixture;
    let store: Store;
    let other: Store;

    beforeEach(async () => {
      fixture = await makeStore();
      store = fixture.store;
      other = await fixture.another();
    });
    afterEach(async () => {
      await other.close();
      await fixture.cleanup();
    });

    const bad = [
      'a:b',
      'a\n',
      'x'.repeat(201),
      '',
      '.',
      '..',
      '/',
      '/a',
      'a/',
      'a//b',
      'a/../b',
      'a/.',
      'ä',
      'a b',
      'a\0b',
      'a~',
      'a\\b',
    ];
    test.each(bad)('refuses the name %j', async (name) => {
      await expect(store.put(name, Buffer.from('x'))).rejects.toThrow(TypeError);
      await expect(store.putStream(name, partsOf())).rejects.toThrow(TypeError);
      await expect(store.get(name)).rejects.toThrow(TypeError);
      await expect(store.open(name)).rejects.toThrow(TypeError);
      await expect(store.stat(name)).rejects.toThrow(TypeError);
      await expect(store.delete(name)).rejects.toThrow(TypeError);
      expect(await namesOf(store, '')).toEqual([]);
    });

    test.each(bad.filter((name) => name !== ''))('refuses to list %j', async (name) => {
      await expect(namesOf(store, name)).rejects.toThrow(TypeError);
    });

    test.each(['a', '.a', '...', '-', '_', 'x'.repeat(200), 'A/b.c-d_e/9', 'a/b/c/d/e/f/g/h'])(
      'takes the name %j',
      async (name) => {
        await store.put(name, Buffer.from('content'));
        expect(await store.get(name)).toEqual(Buffer.from('content'));
        expect(await namesOf(store, '')).toEqual([name]);
        await store.delete(name);
        expect(await namesOf(store, '')).toEqual([]);
      },
    );

    test.each([0, 1, 4095, 4096, 4097, 3 * MIB + 17])(
      'keeps an object of %d bytes',
      async (size) => {
        const bytes = patterned(size);
        await store.put('packs/ab/object', bytes);
        for (const client of [store, other]) {
          expect((await client.get('packs/ab/object')).equals(bytes)).toBe(true);
          expect(await client.stat('packs/ab/object')).toMatchObject({
            name: 'packs/ab/object',
            sizeBytes: size,
          });
        }
      },
    );

    test('put replaces, and may be repeated', async () => {
      await store.put('a/b', patterned(10_000, 1));
      await store.put('a/b', patterned(500, 2));
      await store.put('a/b', patterned(500, 2));
      expect((await other.get('a/b')).equals(patterned(500, 2))).toBe(true);
      expect(await namesOf(other, '')).toEqual(['a/b']);
    });

    test('put copies: the buffer may change after it has resolved', async () => {
      const bytes = patterned(100);
      await store.put('a', bytes);
      bytes.fill(0);
      expect((await store.get('a')).equals(patterned(100))).toBe(true);
    });

    test('put ifAbsent creates, and leaves an existing object alone', async () => {
      await store.put('a/b', Buffer.from('first'), { ifAbsent: true });
      await expect(
        other.put('a/b', Buffer.from('second'), { ifAbsent: true }),
      ).rejects.toMatchObject({ name: 'B2Error', kind: 'exists' });
      expect(String(await store.get('a/b'))).toBe('first');
      await store.delete('a/b');
      await other.put('a/b', Buffer.from('third'), { ifAbsent: true });
      expect(String(await store.get('a/b'))).toBe('third');
      expect(await namesOf(store, '')).toEqual(['a/b']);
    });

    test('of many put ifAbsent at once exactly one wins, and its bytes are there', async () => {
      for (let round = 0; round < 5; round++) {
        const name = `race/${round}`;
        const outcomes = await Promise.allSettled(
          Array.from({ length: 16 }, (_, i) =>
            (i % 2 === 0 ? store : other).put(name, Buffer.from(`writer ${i}`), { ifAbsent: true }),
          ),
        );
        const winners = outcomes.flatMap(({ status }, i) => (status === 'fulfilled' ? [i] : []));
        expect(winners).toHaveLength(1);
        const losers = outcomes.filter((outcome) => outcome.status === 'rejected');
        expect(losers.every(({ reason }) => isKind(reason, 'exists'))).toBe(true);
        expect(String(await store.get(name))).toBe(`writer ${winners[0]}`);
      }
      expect(await namesOf(store, 'race')).toHaveLength(5);
    });

    test('a reader sees whole objects only while they are replaced', async () => {
      const versions = [1, 2, 3, 4].map((seed) => patterned(70_000 + seed, seed));
      await store.put('x/y', versions[0] ?? Buffer.alloc(0));
      let isWriting = true;
      const writing = (async () => {
        for (let i = 0; i < 40; i++) await store.put('x/y', versions[i % 4] ?? Buffer.alloc(0));
        isWriting = false;
      })();
      let reads = 0;
      while (isWriting) {
        const seen = await other.get('x/y');
        expect(versions.some((version) => version.equals(seen))).toBe(true);
        reads++;
      }
      await writing;
      expect(reads).toBeGreaterThan(0);
    });

    test('putStream takes parts in order and replaces', async () => {
      await store.put('s/t', Buffer.from('old'));
      const parts = [patterned(5, 1), patterned(0, 2), patterned(MIB, 3), patterned(4097, 4)];
      await store.putStream('s/t', partsOf(...parts));
      expect((await other.get('s/t')).equals(Buffer.concat(parts))).toBe(true);
      await store.putStream('s/empty', partsOf());
      expect(await other.get('s/empty')).toEqual(Buffer.alloc(0));
    });

    test('putStream whose parts fail passes the error on and changes nothing', async () => {
      await store.put('s/old', Buffer.from('old'));
      const failure = new Error('the source broke');
      const broken = async function* (): AsyncIterable<Uint8Array> {
        yield patterned(100_000);
        throw failure;
      };
      await expect(store.putStream('s/old', broken())).rejects.toBe(failure);
      await expect(store.putStream('s/new', broken())).rejects.toBe(failure);
      expect(await namesOf(other, '')).toEqual(['s/old']);
      expect(String(await other.get('s/old'))).toBe('old');
    });

    test('putStream shows nothing before it has resolved', async () => {
      let seen: string[] | undefined;
      const watching = async function* (): AsyncIterable<Uint8Array> {
        yield patterned(300_000);
        seen = await namesOf(other, '');
        yield patterned(10);
      };
      await store.putStream('s/t', watching());
      expect(seen).toEqual([]);
      expect(await namesOf(other, '')).toEqual(['s/t']);
    });

    test('get returns ranges', async () => {
      const bytes = patterned(10_000);
      await store.put('r', bytes);
      for (const [offset, length] of [
        [0, 10],
        [1, 1],
        [4096, 4096],
        [9_990, 100],
        [0, 10_000],
        [0, 20_000],
        [5, 0],
      ] as const) {
        const got = await store.get('r', { offset, length });
        expect(got.equals(bytes.subarray(offset, offset + length))).toBe(true);
      }
      expect(await store.get('r', { offset: 10_000, length: 5 })).toEqual(Buffer.alloc(0));
      expect(await store.get('r', { offset: 99_999, length: 5 })).toEqual(Buffer.alloc(0));
    });

    test('what is missing is not-found, or undefined for stat', async () => {
      await store.put('there/object', Buffer.from('x'));
      for (const name of ['no', 'no/such', 'there', 'there/no', 'there/object/below']) {
        await expect(store.get(name)).rejects.toMatchObject({ name: 'B2Error', kind: 'not-found' });
        await expect(store.open(name)).rejects.toMatchObject({ kind: 'not-found' });
        expect(await store.stat(name)).toBeUndefined();
      }
      expect(await namesOf(store, '')).toEqual(['there/object']);
    });

    test('delete removes for every client; deleting what is not there succeeds', async () => {
      await store.put('d/a', Buffer.from('x'));
      await store.put('d/b', Buffer.from('x'));
      await other.delete('d/a');
      expect(await store.stat('d/a')).toBeUndefined();
      await expect(store.get('d/a')).rejects.toMatchObject({ kind: 'not-found' });
      expect(await namesOf(store, '')).toEqual(['d/b']);
      for (const name of ['d/a', 'd/never', 'no/such/thing', 'd', 'd/b/below']) {
        await store.delete(name);
      }
      expect(await namesOf(store, '')).toEqual(['d/b']);
    });

    test('list is by whole segments, at any depth', async () => {
      for (const name of ['a', 'ab', 'b/a', 'b/c/d', 'b/c/e', 'bc/x', 'b.c/y']) {
        await store.put(name, Buffer.from(name));
      }
      expect(await namesOf(store, '')).toEqual([
        'a',
        'ab',
        'b.c/y',
        'b/a',
        'b/c/d',
        'b/c/e',
        'bc/x',
      ]);
      expect(await namesOf(store, 'b')).toEqual(['b/a', 'b/c/d', 'b/c/e']);
      expect(await namesOf(store, 'b/c')).toEqual(['b/c/d', 'b/c/e']);
      expect(await namesOf(store, 'b/c/d')).toEqual([]);
      expect(await namesOf(store, 'a')).toEqual([]);
      expect(await namesOf(store, 'none')).toEqual([]);
      for await (const info of store.list('')) {
        expect(info.sizeBytes).toBe(info.name.length);
        expect(Number.isFinite(info.modifiedMs)).toBe(true);
      }
    });

    test('lists 5,000 objects, and their names are there for another client at once', async () => {
      const names = Array.from({ length: 5_000 }, (_, i) => `many/${i % 7}/${i}`);
      for (let i = 0; i < names.length; i += 100) {
        await Promise.all(
          names.slice(i, i + 100).map((name) => store.put(name, Buffer.from(name))),
        );
      }
      expect(await namesOf(other, 'many')).toEqual([...names].sort());
      expect(await namesOf(other, 'many/3')).toHaveLength(714);
    }, 120_000);

    test('list may be left early, and go on while objects come and go', async () => {
      for (let i = 0; i < 100; i++) await store.put(`l/stay${i}`, Buffer.from('x'));
      for await (const { name } of store.list('l')) {
        expect(name).toMatch(/^l\/stay/);
        break;
      }
      const changing = (async () => {
        for (let i = 0; i < 50; i++) {
          await other.put(`l/come${i}`, Buffer.from('x'));
          await other.delete(`l/come${i}`);
        }
      })();
      for (let i = 0; i < 5; i++) {
        const seen = await namesOf(store, 'l');
        expect(seen.filter((name) => name.startsWith('l/stay'))).toHaveLength(100);
        expect(new Set(seen).size).toBe(seen.length);
      }
      await changing;
    });

    test('an open object is read anywhere, also by several at a time', async () => {
      const bytes = patterned(2 * MIB + 321);
      await store.put('o', bytes);
      const reader = await other.open('o');
      expect(reader.sizeBytes).toBe(bytes.length);
      const slab = alignedMemory(MIB);
      const read = async (into: Uint8Array, offset: number): Promise<void> => {
        const n = await reader.read(into, offset);
        const expected = bytes.subarray(offset, offset + into.length);
        expect(n).toBe(expected.length);
        expect(Buffer.compare(into.subarray(0, n), expected)).toBe(0);
      };
      // Aligned memory at aligned offsets; the last of them reaches past the end.
      for (const offset of [0, MIB, 2 * MIB, 4096 * 300]) await read(slab, offset);
      await read(slab.subarray(0, MIB / 2), 4096);
      await read(slab.subarray(4096, 4096 + MIB / 2), 17);
      await Promise.all(
        Array.from({ length: 20 }, (_, i) => read(Buffer.alloc(i * 10_000 + 1), i * 99_991)),
      );
      await read(Buffer.alloc(10), bytes.length);
      await read(Buffer.alloc(10), bytes.length + 5 * MIB);
      await read(Buffer.alloc(0), 0);
      await reader.close();
    });

    test('an open object stays readable after it was replaced or deleted', async () => {
      const bytes = patterned(MIB, 5);
      await store.put('o/a', bytes);
      await store.put('o/b', bytes);
      const readers = [await store.open('o/a'), await store.open('o/b')];
      await other.put('o/a', patterned(MIB, 6));
      await other.delete('o/b');
      for (const reader of readers) {
        const into = alignedMemory(MIB);
        expect(await reader.read(into, 0)).toBe(MIB);
        expect(Buffer.compare(into, bytes)).toBe(0);
        await reader.close();
      }
      expect((await store.get('o/a')).equals(patterned(MIB, 6))).toBe(true);
    });

    test('many calls of all kinds at once do not disturb each other', async () => {
      await Promise.all(
        Array.from({ length: 40 }, async (_, i) => {
          const client = i % 2 === 0 ? store : other;
          const name = `mix/${i % 5}/${i}`;
          const bytes = patterned(i * 997, i);
          await client.put(name, bytes);
          expect((await client.get(name)).equals(bytes)).toBe(true);
          const reader = await client.open(name);
          const into = Buffer.alloc(bytes.length);
          expect(await reader.read(into, 0)).toBe(bytes.length);
          await reader.close();
          expect(into.equals(bytes)).toBe(true);
          expect(await namesOf(client, `mix/${i % 5}`)).toContain(name);
          await client.delete(name);
          expect(await client.stat(name)).toBeUndefined();
        }),
      );
      expect(await namesOf(store, '')).toEqual([]);
    });

    test('space is undefined or plausible', async () => {
      const space = await store.space();
      if (space === undefined) return;
      expect(space.totalBytes).toBeGreaterThan(0);
      expect(space.freeBytes).toBeGreaterThanOrEqual(0);
      expect(space.freeBytes).toBeLessThanOrEqual(space.totalBytes);
    });

    test('the URL is for people: no credentials in it', () => {
      expect(store.url).not.toMatch(/\/\/[^/]*:[^/]*@/);
      expect(store.url).not.toBe('');
    });

    test('close is safe to call twice', async () => {
      const third = await fixture.another();
      await third.close();
      await expect(third.close()).resolves.toBeUndefined();
    });

    test('says whether it can append', () => {
      expect(store.canAppend).toBe(canAppend);
    });

    const withoutAppend = (): void => {
      test('that cannot append says unsupported, and makes nothing', async () => {
        await store.put('q', Buffer.from('x'));
        for (const [name, mode] of [
          ['p', 'create'],
          ['p', 'existing'],
          ['q', 'existing'],
        ] as const) {
          await expect(store.openAppend(name, mode)).rejects.toMatchObject({
            name: 'B2Error',
            kind: 'unsupported',
          });
        }
        expect(await namesOf(store, '')).toEqual(['q']);
      });
    };

    const withAppend = (): void => {
      describe('and appends', () => {
        function appending(title: string, work: (appender: Appender) => Promise<void>): void {
          test(`${title}`, async () => {
            const appender = await store.openAppend('p/a', 'create');
            expect(appender.sizeBytes).toBe(0);
            try {
              await work(appender);
            } finally {
              await appender.close();
            }
          });
        }

        test.each(bad)('refuses to append to the name %j', async (name) => {
          await expect(store.openAppend(name, 'create')).rejects.toThrow(TypeError);
          await expect(store.openAppend(name, 'existing')).rejects.toThrow(TypeError);
        });

        test('only to what exists, with existing', async () => {
          await store.put('there/object', Buffer.from('x'));
          for (const name of ['no', 'no/such', 'there', 'there/no', 'there/object/below']) {
            await expect(store.openAppend(name, 'existing')).rejects.toMatchObject({
              kind: 'not-found',
            });
          }
          expect(await namesOf(store, '')).toEqual(['there/object']);
        });

        appending('synced bytes are there for every client', async (appender) => {
          expect(appender.sizeBytes).toBe(0);
          const written: Buffer[] = [];
          for (let i = 0; i < 20; i++) {
            const bytes = patterned(i * 1_237, i);
            await appender.append(bytes);
            written.push(bytes);
            const all = Buffer.concat(written);
            expect(appender.sizeBytes).toBe(all.length);
            await appender.sync();
            expect((await other.get('p/a')).equals(all)).toBe(true);
            expect(await other.stat('p/a')).toMatchObject({ sizeBytes: all.length });
            expect(await namesOf(other, 'p')).toEqual(['p/a']);
          }
        });

        appending('before a sync a reader sees a part from the front at most', async (appender) => {
          await appender.append(patterned(5_000, 1));
          await appender.sync();
          await appender.append(patterned(5_000, 2));
          const all = Buffer.concat([patterned(5_000, 1), patterned(5_000, 2)]);
          const seen = await other.get('p/a');
          expect(seen.length).toBeGreaterThanOrEqual(5_000);
          expect(seen.equals(all.subarray(0, seen.length))).toBe(true);
        });

        appending('several appends under way keep their order', async (appender) => {
          const parts = Array.from({ length: 50 }, (_, i) => patterned(1_000 + i * 77, i));
          const sizes: number[] = [];
          const done = parts.map((part) => {
            sizes.push(appender.sizeBytes);
            return appender.append(part);
          });
          await Promise.all([...done, appender.sync()]);
          expect((await other.get('p/a')).equals(Buffer.concat(parts))).toBe(true);
          expect(sizes.slice(0, 3)).toEqual([0, 1_000, 2_077]);
        });

        appending(
          'aligned and unaligned pieces mix, also for a reader of the growing object',
          async (appender) => {
            const slab = alignedMemory(MIB);
            const written: Buffer[] = [];
            const reader = await other.open('p/a');
            const into = alignedMemory(4 * MIB);
            const add = async (piece: Uint8Array, seed: number): Promise<void> => {
              piece.set(patterned(piece.length, seed));
              await appender.append(piece);
              written.push(Buffer.from(piece));
              if (seed % 2 === 0) await appender.sync();
              else return;
              const all = Buffer.concat(written);
              expect((await other.get('p/a')).equals(all)).toBe(true);
              expect(await reader.read(into, 0)).toBe(all.length);
              expect(Buffer.compare(into.subarray(0, all.length), all)).toBe(0);
              const tail = Buffer.alloc(5_000);
              const from = Math.max(0, all.length - 5_000);
              expect(await reader.read(tail, from)).toBe(all.length - from);
              expect(tail.subarray(0, all.length - from).equals(all.subarray(from))).toBe(true);
            };
            let seed = 1;
            // Aligned, aligned; a small piece; then nothing fits until the object is a multiple of a page again.
            for (const bytes of [
              MIB,
              131_072,
              100,
              262_144,
              4096 - 100,
              262_144,
              1,
              4095,
              MIB / 2,
              77,
            ]) {
              await add(slab.subarray(0, bytes), seed++);
            }
            await add(Buffer.alloc(300_000), seed++);
            await add(slab.subarray(4096, 4096 + 262_144), seed + (seed % 2));
            expect(reader.sizeBytes).toBe(0);
            await reader.close();
          },
        );

        appending('a reader and the appender work at the same time', async (appender) => {
          const piece = alignedMemory(256 * 1024);
          const count = 24;
          let synced = 0;
          const writing = (async () => {
            for (let i = 0; i < count; i++) {
              piece.fill(i + 1);
              await appender.append(piece);
              await appender.sync();
              synced = i + 1;
            }
          })();
          const into = alignedMemory(256 * 1024);
          const reader = await other.open('p/a');
          let looks = 0;
          while (synced < count) {
            const at = synced - 1;
            if (at >= 0) {
              expect(await reader.read(into, at * into.length)).toBe(into.length);
              expect(into.every((byte) => byte === at + 1)).toBe(true);
            }
            looks++;
            await new Promise((resolve) => setImmediate(resolve));
          }
          await writing;
          await reader.close();
          expect(looks).toBeGreaterThan(0);
          const all = await other.get('p/a');
          expect(all.length).toBe(count * piece.length);
          for (let i = 0; i < count; i++) expect(all[i * piece.length + 7]).toBe(i + 1);
        });

        appending(
          'create refuses a name that is taken, existing goes on at the end',
          async (appender) => {
            await appender.append(Buffer.from('one '));
            await appender.sync();
            await appender.close();
            await appender.close();
            await expect(other.openAppend('p/a', 'create')).rejects.toMatchObject({
              kind: 'exists',
            });
            await store.put('p/b', Buffer.from('put '));
            await expect(store.openAppend('p/b', 'create')).rejects.toMatchObject({
              kind: 'exists',
            });
            for (const [name, before] of [
              ['p/a', 'one '],
              ['p/b', 'put '],
            ] as const) {
              const more = await other.openAppend(name, 'existing');
              expect(more.sizeBytes).toBe(4);
              await more.append(Buffer.from('two'));
              expect(more.sizeBytes).toBe(7);
              await more.sync();
              await more.close();
              expect(String(await store.get(name))).toBe(`${before}two`);
            }
          },
        );

        appending('of many creations of one name one wins', async () => {
          const outcomes = await Promise.allSettled(
            Array.from({ length: 8 }, (_, i) =>
              (i % 2 === 0 ? store : other).openAppend('p/race', 'create'),
            ),
          );
          const made = outcomes.flatMap((o) => (o.status === 'fulfilled' ? [o.value] : []));
          for (const one of made) await one.close();
          expect(made).toHaveLength(1);
        });

        appending('an empty object is one; syncing nothing is fine', async (appender) => {
          await appender.sync();
          await appender.append(Buffer.alloc(0));
          await appender.sync();
          expect(await other.get('p/a')).toEqual(Buffer.alloc(0));
          expect(await namesOf(other, '')).toEqual(['p/a']);
        });

        appending(
          'the buffer may be used again after the append has resolved',
          async (appender) => {
            const buffer = Buffer.alloc(1_000);
            for (let i = 0; i < 10; i++) {
              buffer.fill(i);
              await appender.append(buffer);
            }
            await appender.sync();
            const all = await other.get('p/a');
            for (let i = 0; i < 10; i++) expect(all[i * 1_000 + 999]).toBe(i);
          },
        );

        appending('a closed appender takes nothing more', async (appender) => {
          await appender.append(Buffer.from('x'));
          await appender.sync();
          await appender.close();
          await expect(appender.append(Buffer.from('y'))).rejects.toThrow(/closed/);
          await expect(appender.sync()).rejects.toThrow(/closed/);
          expect(String(await other.get('p/a'))).toBe('x');
        });
      });
    };

    (canAppend ? withAppend : withoutAppend)();
  });
}
