import { describe, expect, it } from 'vitest';
import { PageCache } from '../../../../src/repo/segments/page-cache.js';

const page = (name: string, bytes = 10) => ({ value: { name }, bytes });

describe('PageCache', () => {
  it('loads once, also for callers at the same time', async () => {
    const cache = new PageCache(100);
    let loads = 0;
    const load = async () => {
      loads++;
      await Promise.resolve();
      return page('a');
    };
    const [a, b] = await Promise.all([cache.get('a', load), cache.get('a', load)]);
    expect(a).toBe(b);
    expect(await cache.get('a', load)).toBe(a);
    expect(loads).toBe(1);
  });

  it('stays within its bound and lets the least recently used go', async () => {
    const cache = new PageCache(30);
    const loaded: string[] = [];
    const get = (name: string, bytes?: number) =>
      cache.get(name, () => {
        loaded.push(name);
        return Promise.resolve(page(name, bytes));
      });
    await get('a');
    await get('b');
    await get('c');
    await get('a');
    await get('d'); // pushes b out
    expect(cache.bytes).toBe(30);
    await get('a');
    await get('b');
    expect(loaded).toEqual(['a', 'b', 'c', 'd', 'b']);
    await get('giant', 31);
    await get('giant', 31);
    expect(loaded.slice(-2)).toEqual(['giant', 'giant']);
    expect(cache.bytes).toBe(30);
  });

  it('keeps nothing of a load that failed or is not to be kept, and drops by prefix', async () => {
    const cache = new PageCache(100);
    await expect(cache.get('a', () => Promise.reject(new Error('torn')))).rejects.toThrow('torn');
    await expect(cache.get('a', () => Promise.resolve(page('a')), false)).resolves.toEqual({
      name: 'a',
    });
    expect(cache.bytes).toBe(0);
    await cache.get('1:a', () => Promise.resolve(page('x')));
    await cache.get('11:a', () => Promise.resolve(page('y')));
    cache.drop('1:');
    expect(cache.bytes).toBe(10);
    await expect(cache.get('1:a', () => Promise.resolve(page('z')))).resolves.toEqual({
      name: 'z',
    });
  });
});
