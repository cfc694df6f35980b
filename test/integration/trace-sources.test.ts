/** The conformance suite on real devices, and what is particular to tracing: instances, loss, obstacles. */
import { spawn } from 'node:child_process';
import {
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmdirSync,
  writeFileSync,
} from 'node:fs';
import { open } from 'node:fs/promises';
import path from 'node:path';
import { describe, expect } from 'vitest';
import { systemClock, systemRandom } from '../../src/clock.js';
import type { ChangeSink } from '../../src/devices/change-source.js';
import { openReadDevice } from '../../src/devices/open.js';
import { ScanSource } from '../../src/devices/scan-source.js';
import {
  removeStaleInstances,
  traceHost,
  traceObstacle,
  TRACEFS,
} from '../../src/devices/trace/instance.js';
import { TraceSource } from '../../src/devices/trace/source.js';
import { alignedMemory } from '../../src/memory.js';
import { changeSourceSuite, type SourceBed } from '../support/change-source-suite.js';
import { DISK_NEEDS, addPartitions, imageFile, tool } from '../support/disks.js';
import { newLoop } from '../support/loop.js';
import { requires, type Needs } from '../support/requires.js';
import { tempDir, type TempDir } from '../support/tmp.js';

const TRACE_NEEDS: Needs = {
  ...DISK_NEEDS,
  also: () => {
    if (process.geteuid?.() !== 0) return undefined; // said by `root`
    return existsSync(TRACEFS) ? undefined : 'a kernel with tracefs';
  },
};
const ZRAM_NEEDS: Needs = {
  ...TRACE_NEEDS,
  paths: [...(TRACE_NEEDS.paths ?? []), '/sys/class/zram-control/hot_add'],
};

const SIZE = 64 * 1024 * 1024;
const ignore: ChangeSink = { issued: () => undefined, completed: () => undefined };

const slab = alignedMemory(2 * 1024 * 1024);
let counter = 0;

/** Writes bytes that differ from any before, around the page cache. */
async function writeDirect(file: string, offset: number, bytes: number): Promise<void> {
  const handle = await open(file, 0x4000 | 2); // O_DIRECT | O_RDWR
  try {
    const part = slab.subarray(0, bytes);
    part.fill(0);
    for (let at = 0; at < bytes; at += 512)
      new DataView(slab.buffer, at, 8).setBigUint64(0, BigInt(++counter));
    await handle.write(part, 0, bytes, offset);
  } finally {
    await handle.close();
  }
}

async function diskChange(
  node: string,
  kind: 'discard' | 'zeroes',
  offset: number,
  bytes: number,
): Promise<void> {
  tool('blkdiscard', [
    ...(kind === 'zeroes' ? ['-z'] : []),
    '-f',
    '-o',
    String(offset),
    '-l',
    String(bytes),
    node,
  ]);
}

function ownInstances(): string[] {
  return readdirSync(path.join(TRACEFS, 'instances')).filter((n) =>
    n.startsWith(`b2-${process.pid}-`),
  );
}

async function traceBed(
  dir: TempDir,
  node: string,
  unitBytes: number,
  more: Partial<SourceBed> = {},
): Promise<SourceBed> {
  const device = await openReadDevice(node);
  return {
    sizeBytes: device.facts.sizeBytes,
    unitBytes,
    open: () => TraceSource.open(device.facts),
    write: (offset, bytes) => writeDirect(node, offset, bytes),
    change: (kind, offset, bytes) => diskChange(node, kind, offset, bytes),
    isClean: () => ownInstances().length === 0,
    remove: async () => {
      await device.close();
      await dir.remove();
    },
    ...more,
  };
}

describe('change sources', () => {
  for (const sectorBytes of [512, 4096] as const) {
    changeSourceSuite(
      `trace on a loop device of ${sectorBytes}-byte sectors`,
      requires(TRACE_NEEDS),
      async () => {
        const dir = tempDir();
        const loop = await newLoop(dir, 'disk.img', SIZE, { sectorBytes });
        return traceBed(dir, loop.device, sectorBytes);
      },
      { windowBytes: 4096, kinds: true },
    );
  }

  changeSourceSuite(
    'trace on a partition',
    requires(TRACE_NEEDS),
    async () => {
      const dir = tempDir();
      const loop = await newLoop(dir, 'disk.img', SIZE);
      // Starts that are no whole blocks of the disk: those of the partition count.
      tool(
        'sfdisk',
        ['-q', loop.device],
        'label: gpt\nstart=2050, size=60000\nstart=62061, size=2048\n',
      );
      const [first = '', second = ''] = addPartitions(dir, loop.device, 2);
      return traceBed(dir, first, 512, {
        sizeBytes: Math.floor((60_000 * 512) / 4096) * 4096,
        writeOutside: async () => {
          await writeDirect(second, 0, 4096);
          await writeDirect(loop.device, 0, 4096);
          await writeDirect(loop.device, 2049 * 512, 512);
          await writeDirect(loop.device, 62_050 * 512, 512);
        },
      });
    },
    { windowBytes: 4096, kinds: true },
  );

  changeSourceSuite(
    'trace on a bio-based device (zram)',
    requires(ZRAM_NEEDS),
    async () => {
      const dir = tempDir();
      const number = readFileSync('/sys/class/zram-control/hot_add', 'utf8').trim();
      dir.onRemove(() => {
        writeFileSync(`/sys/block/zram${number}/reset`, '1');
        writeFileSync('/sys/class/zram-control/hot_remove', number);
      });
      writeFileSync(`/sys/block/zram${number}/disksize`, String(SIZE));
      return traceBed(dir, `/dev/zram${number}`, 4096);
    },
    { windowBytes: 4096, kinds: true },
  );

  const scanBed = async (
    dir: TempDir,
    node: string,
    more: Partial<SourceBed> = {},
  ): Promise<SourceBed> => {
    const device = await openReadDevice(node);
    return {
      sizeBytes: device.facts.sizeBytes,
      unitBytes: 4096,
      open: () => ScanSource.open(device, { clock: systemClock, random: systemRandom }),
      write: (offset, bytes) => writeDirect(node, offset, bytes),
      remove: async () => {
        await device.close();
        await dir.remove();
      },
      ...more,
    };
  };

  changeSourceSuite(
    'scan of a loop device',
    requires(DISK_NEEDS),
    async () => {
      const dir = tempDir();
      const loop = await newLoop(dir, 'disk.img', SIZE / 2);
      return scanBed(dir, loop.device, {
        change: (kind, offset, bytes) => diskChange(loop.device, kind, offset, bytes),
      });
    },
    { windowBytes: 65_536, kinds: false },
  );

  changeSourceSuite(
    'scan of an image file',
    requires({}),
    async () => {
      const dir = tempDir();
      return scanBed(dir, imageFile(dir, 'disk.img', SIZE / 2));
    },
    { windowBytes: 65_536, kinds: false },
  );
});

describe('trace instances', () => {
  requires(TRACE_NEEDS).it('are removed when their process is dead, and only then', async () => {
    const machine = traceHost().machine;
    const ns = /pid:\[(\d+)\]/.exec(machine.namespaces)?.[1] ?? '';
    const child = spawn('sleep', ['60'], { stdio: 'ignore' });
    const pid = child.pid ?? 0;
    const found = machine.process(pid);
    const start = typeof found === 'object' ? found.startTicks : '';
    const names = {
      alive: `b2-${pid}-${start}-${ns}-1`,
      reused: `b2-${pid}-1-${ns}-2`,
      otherNamespace: `b2-${pid}-${start}-1-3`,
      foreign: 'somebody-elses',
    };
    const at = (name: string): string => path.join(TRACEFS, 'instances', name);
    try {
      for (const name of Object.values(names)) mkdirSync(at(name));
      // A watch of another test may come first: only what is there counts.
      const left = (): string[] => Object.values(names).filter((name) => existsSync(at(name)));
      await removeStaleInstances();
      expect(left()).toEqual([names.alive, names.otherNamespace, names.foreign]);
      child.kill('SIGKILL');
      await new Promise((resolve) => child.once('exit', resolve));
      await removeStaleInstances();
      expect(left()).toEqual([names.otherNamespace, names.foreign]);
    } finally {
      child.kill('SIGKILL');
      for (const name of Object.values(names)) if (existsSync(at(name))) rmdirSync(at(name));
    }
  });

  requires(TRACE_NEEDS).it('are removed by whoever comes first of several that start', async () => {
    const machine = traceHost().machine;
    const ns = /pid:\[(\d+)\]/.exec(machine.namespaces)?.[1] ?? '';
    const found = machine.process(process.pid);
    const start = typeof found === 'object' ? found.startTicks : '';
    // Of this process, had it begun at another time.
    const names = Array.from(
      { length: 12 },
      (_, k) => `b2-${process.pid}-${Number(start) - 1}-${ns}-${k}`,
    );
    const at = (name: string): string => path.join(TRACEFS, 'instances', name);
    try {
      for (const name of names) mkdirSync(at(name));
      const removed = await Promise.all(Array.from({ length: 6 }, () => removeStaleInstances()));
      const own = removed.flat().filter((name) => names.includes(name));
      expect(own.length).toBeGreaterThan(0);
      expect(new Set(own).size).toBe(own.length);
      expect(names.filter((name) => existsSync(at(name)))).toEqual([]);
    } finally {
      for (const name of names) if (existsSync(at(name))) rmdirSync(at(name));
    }
  });

  requires(TRACE_NEEDS).it('tell that events were lost, once, and go on', async () => {
    await using dir = tempDir();
    const loop = await newLoop(dir, 'disk.img', SIZE);
    const device = await openReadDevice(loop.device);
    const source = await TraceSource.open(device.facts, { cpuBufferBytes: 8192 });
    try {
      for (let i = 0; i < 1500; i++) await writeDirect(loop.device, i * 4096, 4096);
      const poll = await source.poll(ignore, { certain: true });
      expect(poll.loss?.reason).toBe('overrun');
      expect(poll.loss?.message).toContain(loop.device);
      let completed = 0;
      const count: ChangeSink = { issued: () => undefined, completed: () => completed++ };
      await source.poll(count, { certain: true });
      completed = 0;
      await writeDirect(loop.device, 0, 4096);
      expect((await source.poll(count, { certain: true })).loss).toBeUndefined();
      expect(completed).toBe(1);
    } finally {
      await source.close();
      await device.close();
    }
    expect(ownInstances()).toEqual([]);
  });

  requires({}).it(
    'say what is in the way: privilege, no trace file system, no block events',
    async () => {
      await using dir = tempDir();
      expect(await traceObstacle(traceHost(), 1000)).toMatchObject({ reason: 'privilege' });
      const run = () =>
        Promise.resolve({
          status: 32,
          stdout: '',
          stderr: 'mount: unknown filesystem type tracefs.\n',
        });
      const none = await traceObstacle({ ...traceHost(), root: dir.join('none'), run }, 0);
      expect(none?.reason).toBe('tracefs');
      expect(none?.message).toContain('unknown filesystem type tracefs');
      mkdirSync(dir.join('some/events'), { recursive: true });
      writeFileSync(dir.join('some/trace_clock'), '[mono]');
      const bare = await traceObstacle({ ...traceHost(), root: dir.join('some'), run }, 0);
      expect(bare?.reason).toBe('events');
      expect(bare?.message).toContain('header_page');
    },
  );
});
