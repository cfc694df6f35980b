/** File systems inside a point whose reader thread, or whose agent, dies: errors at once, never a wait, and the next look works. */
import { execFileSync } from 'node:child_process';
import { mkdirSync, readFileSync, readdirSync, truncateSync, writeFileSync } from 'node:fs';
import type { Worker } from 'node:worker_threads';
import { afterEach, beforeEach, expect, it, vi } from 'vitest';

import { systemClock } from '../../../src/clock.js';
import type { B2Event } from '../../../src/events.js';
import { FilesView, type FilesSource } from '../../../src/mount/files-view.js';
import type { TreeDirectory, TreeFile } from '../../../src/mount/tree.js';
import { tool } from '../../support/disks.js';
import { FileImage } from '../../support/image-memory.js';
import { LOOP_NEEDS } from '../../support/loop.js';
import { requires } from '../../support/requires.js';
import { tempDir, type TempDir } from '../../support/tmp.js';

const threads = vi.hoisted(() => [] as Worker[]);
vi.mock('node:worker_threads', async (original) => {
  const real = await original<typeof import('node:worker_threads')>();
  class Watched extends real.Worker {
    constructor(...args: ConstructorParameters<typeof real.Worker>) {
      super(...args);
      threads.push(this);
    }
  }
  return { ...real, Worker: Watched };
});

const MIB = 1024 * 1024;
const needs = {
  ...LOOP_NEEDS,
  tools: [...(LOOP_NEEDS.tools ?? []), 'unshare', 'nsenter', 'mke2fs'],
  paths: [...(LOOP_NEEDS.paths ?? []), '/dev/fuse'],
};

/** Processes of ours that hold or read the file systems: children of this one. */
function helpers(): readonly string[] {
  return readdirSync('/proc').filter((name) => {
    if (!/^\d+$/.test(name)) return false;
    try {
      const line = readFileSync(`/proc/${name}/cmdline`, 'latin1');
      if (line.includes(`\0b2-files\0`) && line.includes(`\0${process.pid}\0`)) return true;
      if (!line.includes('/files/agent.js')) return false;
      return readFileSync(`/proc/${name}/status`, 'utf8').includes(`\nPPid:\t${process.pid}\n`);
    } catch {
      return false;
    }
  });
}

requires(needs).describe('file systems inside a point', () => {
  let dir: TempDir;
  let view: FilesView;
  let source: FilesSource;
  const events: B2Event[] = [];
  const content = Buffer.alloc(4 * MIB, 'b2 ');

  beforeEach(() => {
    dir = tempDir();
    events.length = 0;
    threads.length = 0;
    mkdirSync(dir.join('tree'));
    writeFileSync(dir.join('tree/file'), content);
    writeFileSync(dir.join('disk'), '');
    truncateSync(dir.join('disk'), 32 * MIB);
    tool('mke2fs', ['-q', '-F', '-t', 'ext4', '-d', dir.join('tree'), dir.join('disk')]);
    view = new FilesView({
      clock: systemClock,
      events: (event) => events.push(event),
      cacheDir: dir.join('cache'),
    });
    source = {
      key: 'point',
      volume: 'web/sda',
      name: 'web/sda #1',
      mtimeNs: 0n,
      openImage: () => Promise.resolve(new FileImage(dir.join('disk'))),
    };
  });
  afterEach(async () => {
    await view.close();
    expect(helpers()).toEqual([]);
    await dir.remove();
  });

  const root = async (): Promise<TreeDirectory> => {
    const [name = ''] = await view.names(source);
    const found = await view.directory(source, name);
    if (found === undefined) throw new Error('no file system found');
    return found;
  };
  const fileIn = async (directory: TreeDirectory): Promise<TreeFile> => {
    const entry = await directory.lookup('file');
    if (entry?.node.kind !== 'file') throw new Error('no file');
    return entry.node;
  };
  const names = async (directory: TreeDirectory): Promise<readonly string[]> => {
    const all: string[] = [];
    for await (const { name } of directory.list()) all.push(name);
    return all.sort();
  };

  it('whose reader thread dies gives errors at once and a warning; the next look opens it anew', async () => {
    const directory = await root();
    const open = await (await fileIn(directory)).open();
    const head = Buffer.alloc(4096);
    await open.read(head, 0);
    expect(head.equals(content.subarray(0, 4096))).toBe(true);
    expect(threads.length).toBe(1);
    // It waits in the kernel: the next request wakes it, and it dies of that.
    const dead = threads[0]?.terminate();
    // Beyond what the kernel has read ahead: from the image, which nobody serves then.
    const tail = Buffer.alloc(4096);
    execFileSync('sh', ['-c', 'echo 1 >/proc/sys/vm/drop_caches']);
    await expect(open.read(tail, content.length - 4096)).rejects.toMatchObject({
      kind: 'io',
      message: expect.stringContaining('cannot be read any more') as string,
    });
    await dead;
    expect(events.filter((e) => e.type === 'warning')).toMatchObject([
      { message: expect.stringContaining("the thread that reads the kernel's requests") as string },
    ]);
    // The open file stays with what it was opened on; a new one is on a mount of its own.
    expect(await names(directory)).toEqual(['file', 'lost+found']);
    const again = await (await fileIn(directory)).open();
    await again.read(tail, content.length - 4096);
    expect(tail.equals(content.subarray(-4096))).toBe(true);
    expect(view.openPoints).toBe(1);
    await expect(open.read(tail, content.length - 4096)).rejects.toMatchObject({ kind: 'io' });
    await open.close();
    await again.close();
  });

  it('whose agent is killed: likewise', async () => {
    const directory = await root();
    const open = await (await fileIn(directory)).open();
    const agent = helpers().find((pid) =>
      readFileSync(`/proc/${pid}/cmdline`, 'latin1').includes('/files/agent.js'),
    );
    process.kill(Number(agent), 'SIGKILL');
    await expect(open.read(Buffer.alloc(4096), 0)).rejects.toMatchObject({ kind: 'failed' });
    expect(await names(directory)).toEqual(['file', 'lost+found']);
    await open.close();
  });
});
