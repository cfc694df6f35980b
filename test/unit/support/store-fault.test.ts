import { describe, expect, test } from 'vitest';
import { failNth, FaultStore } from '../../support/store-fault.js';
import { MemoryStore } from '../../support/store-memory.js';
import { storeSuite } from '../../support/store-suite.js';

for (const canAppend of [true, false]) {
  storeSuite(
    `FaultStore without faults (canAppend: ${canAppend})`,
    async () => {
      const store = new FaultStore(new MemoryStore({ canAppend }));
      return { store, another: async () => store, cleanup: () => store.close() };
    },
    { append: canAppend },
  );
}

const bytes = Buffer.from('0123456789');

describe('FaultStore', () => {
  test('fails the calls that a map names, per kind', async () => {
    const inner = new MemoryStore();
    const store = new FaultStore(inner, { put: '.ERN', stat: 'R' });
    await store.put('a', bytes);
    await expect(store.put('b', bytes)).rejects.toMatchObject({ kind: 'io', retryable: false });
    await expect(store.put('b', bytes)).rejects.toMatchObject({ kind: 'io', retryable: true });
    await expect(store.put('b', bytes)).rejects.toMatchObject({ kind: 'no-space' });
    await expect(store.stat('a')).rejects.toMatchObject({ kind: 'io', retryable: true });
    expect(await inner.stat('b')).toBeUndefined();
    await store.put('b', bytes);
    expect(store.calls).toMatchObject({ put: 5, stat: 1, get: 0 });
    expect(store.totalCalls).toBe(6);
    expect(store.injected).toBe(4);
  });

  test('a star repeats the last one; an unknown character is refused', async () => {
    const store = new FaultStore(new MemoryStore(), { delete: '.E*' });
    await store.delete('a');
    for (let i = 0; i < 5; i++)
      await expect(store.delete('a')).rejects.toMatchObject({ kind: 'io' });
    store.setFaults();
    await store.delete('a');
    expect(() => new FaultStore(new MemoryStore(), { put: '..x' })).toThrow(TypeError);
  });

  test('a lost answer has taken effect', async () => {
    const inner = new MemoryStore();
    const store = new FaultStore(inner, { put: 'A', delete: 'A', append: 'A', openAppend: 'A' });
    await expect(store.put('a', bytes)).rejects.toMatchObject({ kind: 'io', retryable: true });
    expect(await inner.get('a')).toEqual(bytes);
    await expect(store.delete('a')).rejects.toMatchObject({ kind: 'io' });
    expect(await inner.stat('a')).toBeUndefined();
    await expect(store.openAppend('p', 'create')).rejects.toMatchObject({ kind: 'io' });
    const appender = await store.openAppend('p', 'existing');
    await expect(appender.append(bytes)).rejects.toMatchObject({ kind: 'io' });
    expect(await inner.get('p')).toEqual(bytes);
  });

  test('a partial append leaves half, and the appender is dead', async () => {
    const inner = new MemoryStore();
    const store = new FaultStore(inner, { append: '.P' });
    const appender = await store.openAppend('p', 'create');
    await appender.append(bytes);
    await expect(appender.append(bytes)).rejects.toMatchObject({ kind: 'no-space' });
    await expect(appender.append(bytes)).rejects.toMatchObject({ kind: 'no-space' });
    await expect(appender.sync()).rejects.toMatchObject({ kind: 'no-space' });
    await appender.close();
    expect(String(await inner.get('p'))).toBe('012345678901234');
  });

  test('a failed sync syncs nothing', async () => {
    const inner = new MemoryStore();
    const store = new FaultStore(inner, { sync: 'E' });
    const appender = await store.openAppend('p', 'create');
    await appender.append(bytes);
    await expect(appender.sync()).rejects.toMatchObject({ kind: 'io' });
    expect(await inner.crashAt(inner.operations, { tear: 'drop' }).stat('p')).toBeUndefined();
  });

  test('reads come short or with a bit flipped', async () => {
    const inner = new MemoryStore();
    await inner.put('a', bytes);
    const store = new FaultStore(inner, { get: 'SF', read: 'SF' });
    expect(String(await store.get('a'))).toBe('01234');
    const flipped = await store.get('a');
    expect(flipped.filter((byte, i) => byte !== bytes[i])).toHaveLength(1);
    const reader = await store.open('a');
    const into = Buffer.alloc(10);
    expect(await reader.read(into, 0)).toBe(5);
    expect(await reader.read(into, 0)).toBe(10);
    expect(into.filter((byte, i) => byte !== bytes[i])).toHaveLength(1);
    expect(await inner.get('a')).toEqual(bytes);
  });

  test('a full store takes nothing until there is room, but lets delete through', async () => {
    const inner = new MemoryStore();
    const store = new FaultStore(inner);
    await store.put('a', bytes);
    const appender = await store.openAppend('p', 'create');
    store.fillUp();
    await expect(store.put('b', bytes)).rejects.toMatchObject({ kind: 'no-space' });
    await expect(store.openAppend('q', 'create')).rejects.toMatchObject({ kind: 'no-space' });
    await expect(appender.append(bytes)).rejects.toMatchObject({ kind: 'no-space' });
    await expect(appender.sync()).rejects.toMatchObject({ kind: 'no-space' });
    expect(await store.get('a')).toEqual(bytes);
    await store.delete('a');
    store.makeRoom();
    await store.put('b', bytes);
    expect(await inner.get('b')).toEqual(bytes);
  });

  test('hanging calls go through when they are released; waiting ones when told', async () => {
    const inner = new MemoryStore();
    let open = (): void => undefined;
    const gate = new Promise<void>((resolve) => (open = resolve));
    const store = new FaultStore(inner, { put: 'H' }, ({ kind }) =>
      kind === 'get' ? { do: 'wait', until: () => gate } : undefined,
    );
    const put = store.put('a', bytes);
    await new Promise((resolve) => setTimeout(resolve, 5));
    expect(store.hanging).toBe(1);
    expect(await inner.stat('a')).toBeUndefined();
    store.releaseHung();
    await put;
    let isDone = false;
    const get = store.get('a').finally(() => (isDone = true));
    await new Promise((resolve) => setTimeout(resolve, 5));
    expect(isDone).toBe(false);
    open();
    expect(await get).toEqual(bytes);
  });

  test('failNth fails one call among those of its kinds', async () => {
    const store = new FaultStore(
      new MemoryStore(),
      failNth(1, { do: 'no-space' }, ['put', 'delete']),
    );
    await store.put('a', bytes);
    await store.get('a');
    await expect(store.delete('a')).rejects.toMatchObject({ kind: 'no-space' });
    await store.delete('a');
    expect(store.injected).toBe(1);
  });
});
