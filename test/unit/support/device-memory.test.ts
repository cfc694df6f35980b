import { describe, expect, it } from 'vitest';

import { ioError } from '../../../src/errors.js';
import { MemoryDevice } from '../../support/device-memory.js';
import { readDeviceSuite, writeDeviceSuite } from '../../support/device-suite.js';
import { noise } from '../../support/disks.js';

for (const kind of ['file', 'block'] as const) {
  readDeviceSuite(`memory as a ${kind}`, async () => {
    const content = noise(1, 700_000).fill(0, 100_000, 300_000);
    const device = new MemoryDevice(content, { kind });
    return {
      path: device.facts.path,
      content,
      logicalBlockBytes: 512,
      open: async () => device,
      poke: (offset, data) => void device.write(data, offset),
    };
  });
  writeDeviceSuite(`memory as a ${kind}`, async () => {
    const device = new MemoryDevice(new Uint8Array(700_000), { kind });
    return {
      path: device.facts.path,
      sizeBytes: 700_000,
      isFixed: kind === 'block',
      open: async () => device,
      peek: () => device.content(),
    };
  });
}

describe('faults of a device in memory', () => {
  it('come where they are asked for, and change nothing', async () => {
    const device = new MemoryDevice(new Uint8Array(8192), {
      fault: (call, offset) =>
        call === 'write' && offset === 4096
          ? ioError('write', '/dev/memory', new Error('EIO'))
          : undefined,
    });
    await device.write(noise(1, 4096), 0);
    await expect(device.write(noise(2, 4096), 4096)).rejects.toMatchObject({ kind: 'io' });
    expect(
      device
        .content()
        .subarray(4096)
        .every((byte) => byte === 0),
    ).toBe(true);
    expect(device.calls).toEqual([{ call: 'write', offset: 0, length: 4096 }]);
  });
});
