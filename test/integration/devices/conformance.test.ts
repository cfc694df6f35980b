/** Every kind of device against the contract of device.ts: real loop devices, partitions and files. */
import { readFileSync } from 'node:fs';

import { openReadDevice, openWriteDevice } from '../../../src/devices/open.js';
import {
  readDeviceSuite,
  writeDeviceSuite,
  type MadeDevice,
  type MadeTarget,
} from '../../support/device-suite.js';
import {
  addPartitions,
  DISK_NEEDS,
  imageFile,
  noise,
  pokeWithDd,
  tool,
} from '../../support/disks.js';
import { attachLoop, newLoop } from '../../support/loop.js';
import { requires } from '../../support/requires.js';
import type { TempDir } from '../../support/tmp.js';

const KIB = 1024;
const MIB = 1024 * KIB;

/** Noise with stretches of zeros, as devices have. */
function patchwork(seed: number, length: number): Uint8Array<ArrayBuffer> {
  const bytes = noise(seed, length);
  for (let at = 128 * KIB; at < length; at += 512 * KIB) bytes.fill(0, at, at + 200 * KIB);
  return bytes;
}

/** The content of a loop device behind a page cache of the device's: what reached the file. */
function dd(path: string, offset: number, length: number): Uint8Array {
  tool('blockdev', ['--flushbufs', path]);
  return readFileSync(path).subarray(offset, offset + length);
}

function opened(
  path: string,
  content: Uint8Array,
  logicalBlockBytes: number,
  poke?: MadeDevice['poke'],
): MadeDevice {
  return {
    path,
    content,
    logicalBlockBytes,
    open: () => openReadDevice(path),
    poke: poke ?? ((offset, data) => pokeWithDd(path, offset, data)),
  };
}

const needs = requires(DISK_NEEDS);

for (const [name, sizeBytes] of [
  ['image file', 3 * MIB],
  ['image file of an odd size', 3 * MIB + 1234],
] as const) {
  readDeviceSuite(name, async (dir) => {
    const content = patchwork(1, sizeBytes);
    return opened(imageFile(dir, 'disk.img', content), content, 512);
  });
}

readDeviceSuite('sparse image file', async (dir) => {
  const content = patchwork(2, 5 * MIB + 10);
  content.fill(0, MIB, 2 * MIB);
  content.fill(0, 5 * MIB - 100 * KIB);
  const file = imageFile(dir, 'disk.img', content);
  tool('fallocate', ['--dig-holes', file]);
  return opened(file, content, 512);
});

readDeviceSuite('image file without a byte of data', async (dir) => {
  const content = new Uint8Array(2 * MIB);
  return opened(imageFile(dir, 'disk.img', 2 * MIB), content, 512);
});

requires({ root: true, tools: ['mount', 'umount'] }).describe('other file systems', () => {
  readDeviceSuite('image file on tmpfs', async (dir) => {
    tool('mount', ['-t', 'tmpfs', '-o', 'size=16m', 'none', dir.path]);
    dir.onRemove(() => void tool('umount', [dir.path]));
    const content = patchwork(3, 2 * MIB + 77);
    return opened(imageFile(dir, 'disk.img', content), content, 512);
  });
});

needs.describe('block devices', () => {
  for (const [sectorBytes, sizeBytes] of [
    [512, 3 * MIB],
    [512, 3 * MIB + 3 * 512],
    [4096, 3 * MIB],
  ] as const) {
    readDeviceSuite(`loop device, ${sizeBytes} bytes in sectors of ${sectorBytes}`, async (dir) => {
      const content = patchwork(4, sizeBytes);
      const { device } = await attachLoop(dir, imageFile(dir, 'disk.img', content), {
        sectorBytes,
      });
      return opened(device, content, sectorBytes);
    });

    writeDeviceSuite(
      `loop device, ${sizeBytes} bytes in sectors of ${sectorBytes}`,
      async (dir) => {
        const { device } = await newLoop(dir, 'disk.img', sizeBytes, { sectorBytes });
        return {
          path: device,
          sizeBytes,
          isFixed: true,
          open: () => openWriteDevice(device, 'existing'),
          peek: () => dd(device, 0, sizeBytes),
        };
      },
    );
  }

  // Sector 63 is where DOS put partitions: not a multiple of 4096 bytes.
  for (const [sectorBytes, firstSector, sectors] of [
    [512, 63, 4001],
    [512, 2048, 4096],
    [4096, 6, 700],
  ] as const) {
    const title = `partition from sector ${firstSector} of ${sectors} sectors of ${sectorBytes}`;
    const disk = async (
      dir: TempDir,
    ): Promise<{ device: string; partition: string; content: Uint8Array; at: number }> => {
      const bytes = patchwork(5, 5 * MIB);
      const { device } = await attachLoop(dir, imageFile(dir, 'disk.img', bytes), { sectorBytes });
      tool(
        'sfdisk',
        ['--quiet', '--no-reread', '--wipe=never', device],
        `label: dos\nstart=${firstSector}, size=${sectors}, type=83\n`,
      );
      const [partition = ''] = addPartitions(dir, device, 1);
      const at = firstSector * sectorBytes;
      return { device, partition, at, content: bytes.slice(at, at + sectors * sectorBytes) };
    };

    readDeviceSuite(title, async (dir) => {
      const { device, partition, content, at } = await disk(dir);
      return opened(partition, content, sectorBytes, (offset, data) =>
        pokeWithDd(device, at + offset, data),
      );
    });

    writeDeviceSuite(title, async (dir): Promise<MadeTarget> => {
      const { device, partition, content, at } = await disk(dir);
      const { byteLength } = content;
      return {
        path: partition,
        sizeBytes: byteLength,
        isFixed: true,
        open: () => openWriteDevice(partition, 'existing'),
        peek: () => dd(device, at, byteLength),
      };
    });
  }
});

for (const [name, sizeBytes] of [
  ['new image file', 3 * MIB],
  ['new image file of an odd size', 3 * MIB + 1234],
] as const) {
  writeDeviceSuite(name, async (dir) => {
    const path = dir.join('target.img');
    return {
      path,
      sizeBytes,
      isFixed: false,
      open: () => openWriteDevice(path, 'new'),
      peek: () => readFileSync(path),
    };
  });
}

writeDeviceSuite('existing image file', async (dir) => {
  const path = imageFile(dir, 'target.img', noise(8, 2 * MIB));
  return {
    path,
    sizeBytes: 3 * MIB + 5,
    isFixed: false,
    open: () => openWriteDevice(path, 'existing'),
    peek: () => readFileSync(path),
  };
});
