/** Objects that stay open while their disk goes away and comes back. */
import { describe, expect, it } from 'vitest';

import { B2Error } from '../../../src/errors.js';
import { openLasting } from '../../../src/repo/lasting-reader.js';
import type { ObjectReader, Store } from '../../../src/repo/store.js';

/** A disk with one object: what was open when it went fails for ever. */
class Disk {
  content = Buffer.from('0123456789');
  isAway = false;
  /** How often the object was opened and closed. */
  opened = 0;
  closed = 0;
  #away = 0;
  readonly store = { open: () => this.#open() } as unknown as Store;

  leave(): void {
    this.isAway = true;
    this.#away = this.opened;
  }

  async #open(): Promise<ObjectReader> {
    await Promise.resolve();
    if (this.isAway) throw new B2Error('not-found', 'there is no such directory');
    const { content } = this;
    const mine = ++this.opened;
    return {
      sizeBytes: content.length,
      read: async (into, offset) => {
        await Promise.resolve();
        if (mine <= this.#away) throw new B2Error('io', `EIO ${mine}`);
        return content.copy(into, 0, offset, offset + into.length);
      },
      close: () => {
        this.closed++;
        return Promise.resolve();
      },
    };
  }
}

async function textOf(reader: ObjectReader, offset: number, length: number): Promise<string> {
  const into = Buffer.alloc(length);
  expect(await reader.read(into, offset)).toBe(length);
  return into.toString('latin1');
}

describe('openLasting', () => {
  it('reads on when the disk is back, opened once for all who wait', async () => {
    const disk = new Disk();
    const reader = await openLasting(disk.store, 'x');
    expect(await textOf(reader, 2, 3)).toBe('234');
    disk.leave();
    await expect(textOf(reader, 0, 1)).rejects.toMatchObject({ kind: 'io', message: 'EIO 1' });
    await expect(textOf(reader, 0, 1)).rejects.toMatchObject({ kind: 'io', message: 'EIO 1' });
    disk.isAway = false;
    const texts = await Promise.all([0, 3, 6].map((at) => textOf(reader, at, 2)));
    expect(texts).toEqual(['01', '34', '67']);
    expect([disk.opened, disk.closed]).toEqual([2, 1]);
    await reader.close();
    expect(disk.closed).toBe(2);
  });

  it('takes nothing else for it', async () => {
    const disk = new Disk();
    const reader = await openLasting(disk.store, 'x');
    disk.leave();
    disk.isAway = false;
    disk.content = Buffer.from('another object');
    await expect(textOf(reader, 0, 1)).rejects.toMatchObject({ kind: 'io', message: 'EIO 1' });
    await reader.close();
    expect(disk.closed).toBe(disk.opened);
  });

  it('opens nothing any more when it is closed', async () => {
    const disk = new Disk();
    const reader = await openLasting(disk.store, 'x');
    disk.leave();
    disk.isAway = false;
    const late = textOf(reader, 0, 1);
    await reader.close();
    await expect(late).rejects.toThrow('EIO 1');
    expect(disk.closed).toBe(disk.opened);
  });

  it('opens nothing anew for other errors', async () => {
    const disk = new Disk();
    const reader = await openLasting(
      {
        open: async (name: string) => ({
          ...(await disk.store.open(name)),
          read: () => Promise.reject(new B2Error('damaged', 'bad')),
        }),
      } as unknown as Store,
      'x',
    );
    await expect(textOf(reader, 0, 1)).rejects.toThrow('bad');
    expect(disk.opened).toBe(1);
  });
});
