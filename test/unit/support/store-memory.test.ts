import { describe, expect, test } from 'vitest';
import type { Store } from '../../../src/repo/store.js';
import { MemoryStore } from '../../support/store-memory.js';
import { patterned, storeSuite } from '../../support/store-suite.js';

for (const canAppend of [true, false]) {
  storeSuite(
    `MemoryStore (canAppend: ${canAppend})`,
    async () => {
      const store = new MemoryStore({ canAppend });
      return { store, another: async () => store, cleanup: () => store.close() };
    },
    { append: canAppend },
  );
}

/** A reproducible generator of numbers in [0, 1). */
function seeded(seed: number): () => number {
  let state = seed;
  return () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 2 ** 32;
  };
}

async function contents(store: Store): Promise<Record<string, string>> {
  const found: Record<string, string> = {};
  for await (const { name } of store.list('')) found[name] = String(await store.get(name));
  return found;
}

describe('MemoryStore.crashAt', () => {
  test('puts and deletes are there from their operation on', async () => {
    const store = new MemoryStore();
    await store.put('a', Buffer.from('1'));
    await store.put('b', Buffer.from('2'));
    await store.put('a', Buffer.from('3'));
    await store.delete('b');
    await store.delete('never');
    expect(store.operations).toBe(4);
    const states = [{}, { a: '1' }, { a: '1', b: '2' }, { a: '3', b: '2' }, { a: '3' }];
    for (const [i, state] of states.entries()) {
      for (const tear of ['none', 'drop', 'tear'] as const) {
        expect(await contents(store.crashAt(i, { tear, random: seeded(i) }))).toEqual(state);
      }
    }
  });

  test('unsynced bytes and names survive a kill, and are gone after a power cut', async () => {
    const store = new MemoryStore();
    const appender = await store.openAppend('p', 'create');
    await appender.append(Buffer.from('one'));
    await appender.sync();
    await appender.append(Buffer.from('two'));
    await appender.append(Buffer.from('three'));
    await appender.sync();
    const kept = async (tear: 'none' | 'drop'): Promise<(string | undefined)[]> =>
      Promise.all(
        Array.from({ length: store.operations + 1 }, async (_, i) => {
          return (await contents(store.crashAt(i, { tear })))['p'];
        }),
      );
    expect(await kept('none')).toEqual([
      undefined,
      '',
      'one',
      'one',
      'onetwo',
      'onetwothree',
      'onetwothree',
    ]);
    expect(await kept('drop')).toEqual([
      undefined,
      undefined,
      undefined,
      'one',
      'one',
      'one',
      'onetwothree',
    ]);
  });

  test('tearing keeps what was synced and harms any page that was not', async () => {
    const store = new MemoryStore();
    const bytes = patterned(60_000);
    bytes.forEach((byte, i) => (bytes[i] = byte | 1));
    const appender = await store.openAppend('p', 'create');
    await appender.append(bytes.subarray(0, 10_000));
    await appender.sync();
    await appender.append(bytes.subarray(10_000));
    const lengths = new Set<number>();
    let withHoles = 0;
    for (let seed = 0; seed < 200; seed++) {
      const image = store.crashAt(store.operations, { tear: 'tear', random: seeded(seed * 7919) });
      const left = await image.get('p');
      expect(left.subarray(0, 10_000).equals(bytes.subarray(0, 10_000))).toBe(true);
      lengths.add(left.length);
      const firstZero = left.indexOf(0);
      if (firstZero >= 0 && left.subarray(firstZero).some((byte) => byte !== 0)) withHoles++;
      left.forEach((byte, i) => {
        if (byte !== 0 && byte !== bytes[i]) throw new Error(`byte ${i} was never written`);
      });
    }
    expect(lengths.size).toBeGreaterThan(50);
    expect(withHoles).toBeGreaterThan(20);
  });

  test('an operation under way may have happened or not; an acknowledged one has', async () => {
    const store = new MemoryStore();
    await Promise.all([store.put('a', Buffer.from('1')), store.put('b', Buffer.from('2'))]);
    const seen = new Set<string>();
    for (let seed = 0; seed < 100; seed++) {
      const image = store.crashAt(1, { tear: 'tear', random: seeded(seed * 104729) });
      seen.add(
        Object.keys(await contents(image))
          .sort()
          .join(),
      );
    }
    expect([...seen].sort()).toEqual(['', 'a', 'a,b', 'b']);
    for (let seed = 0; seed < 20; seed++) {
      const image = store.crashAt(2, { tear: 'tear', random: seeded(seed) });
      expect(await contents(image)).toEqual({ a: '1', b: '2' });
    }
  });

  test('an image goes on as a store, and can crash again', async () => {
    const store = new MemoryStore();
    const first = await store.openAppend('p', 'create');
    await first.append(Buffer.from('one'));
    await first.sync();
    const image = store.crashAt(store.operations, { tear: 'drop' });
    const second = await image.openAppend('p', 'existing');
    await second.append(Buffer.from('two'));
    expect(await contents(image.crashAt(image.operations, { tear: 'drop' }))).toEqual({ p: 'one' });
    await second.sync();
    expect(await contents(image.crashAt(image.operations, { tear: 'drop' }))).toEqual({
      p: 'onetwo',
    });
    expect(await contents(image.crashAt(0, { tear: 'drop' }))).toEqual({ p: 'one' });
    expect(await contents(store)).toEqual({ p: 'one' });
    expect(await contents(image.clone())).toEqual({ p: 'onetwo' });
  });

  test('bytes appended to a replaced object do not reach the new one', async () => {
    const store = new MemoryStore();
    const appender = await store.openAppend('p', 'create');
    await store.put('p', Buffer.from('new'));
    await appender.append(Buffer.from('lost'));
    await appender.sync();
    expect(await contents(store.crashAt(store.operations, { tear: 'drop' }))).toEqual({ p: 'new' });
  });
});
