/** Live capture by scanning: exact where nothing was written meanwhile, never claimed where something was. And which source `auto` takes. */
import { open } from 'node:fs/promises';
import { existsSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { LiveCapture, type CaptureEvent } from '../../src/capture/live-capture.js';
import { systemClock, systemRandom } from '../../src/clock.js';
import { chooseSource } from '../../src/devices/choose-source.js';
import { openReadDevice } from '../../src/devices/open.js';
import { ScanSource } from '../../src/devices/scan-source.js';
import { TRACEFS, traceHost } from '../../src/devices/trace/instance.js';
import { Coverage } from '../../src/format/commit.js';
import { imageFile, noise } from '../support/disks.js';
import { LOOP_NEEDS, newLoop } from '../support/loop.js';
import { VersionSink } from '../support/raw-writers.js';
import { requires } from '../support/requires.js';
import { tempDir } from '../support/tmp.js';

const SIZE = 4 * 1024 * 1024;
const options = { clock: systemClock, random: systemRandom };

describe('capture by scanning', () => {
  it('follows an image file, and claims nothing of a file that is written all the time', async () => {
    await using dir = tempDir();
    const content = Buffer.from(noise(1, SIZE));
    const file = imageFile(dir, 'disk.img', content);
    const device = await openReadDevice(file);
    const source = await ScanSource.open(device, options);
    const sink = new VersionSink(SIZE, 16);
    const events: CaptureEvent[] = [];
    const capture = LiveCapture.start({
      source,
      device,
      sink,
      clock: systemClock,
      intervalMs: 50,
      attemptMs: 300,
      onEvent: (e) => void events.push(e),
    });
    const handle = await open(file, 'r+');
    const put = async (offset: number, value: number): Promise<void> => {
      content.fill(value, offset, offset + 4096);
      await handle.write(content, offset, 4096, offset);
    };
    try {
      expect((await capture.point()).coverage).toBe(Coverage.unknown);
      expect(sink.image.equals(content)).toBe(true);
      await put(123 * 4096, 7);
      const second = await capture.point();
      expect(second.blocks).toBeLessThanOrEqual(32);
      expect(sink.image.equals(content)).toBe(true);
      const before = sink.points.length;
      let writing = true;
      const writer = (async () => {
        for (let i = 0; writing; i++) {
          await put((i % 1000) * 4096, i % 256);
          await systemClock.sleep(2);
        }
      })();
      try {
        for (let i = 0; events.filter((e) => e.type === 'busy').length < 2; i++) {
          expect(i).toBeLessThan(3000);
          await systemClock.sleep(10);
        }
        expect(sink.points.length).toBe(before);
      } finally {
        writing = false;
        await writer;
      }
      await capture.point();
      expect(sink.image.equals(content)).toBe(true);
    } finally {
      await capture.stop();
      await source.close();
      await handle.close();
      await device.close();
    }
  });
});

describe('choosing a source', () => {
  it('scans image files, and says what that costs', async () => {
    await using dir = tempDir();
    const device = await openReadDevice(imageFile(dir, 'disk.img', SIZE));
    const chosen = await chooseSource(device, 'auto', options);
    expect(chosen.source.kind).toBe('scan');
    expect(chosen.isFallback).toBe(false);
    expect(chosen.why).toContain('reading the whole device');
    await chosen.source.close();
    await expect(chooseSource(device, 'trace', options)).rejects.toMatchObject({
      kind: 'unsupported',
    });
    await device.close();
  });

  requires({ ...LOOP_NEEDS, paths: [...(LOOP_NEEDS.paths ?? []), TRACEFS] }).it(
    'traces block devices, and scans where that cannot be had',
    async () => {
      await using dir = tempDir();
      const loop = await newLoop(dir, 'disk.img', SIZE);
      const device = await openReadDevice(loop.device);
      const traced = await chooseSource(device, 'auto', options);
      expect(traced.source.kind).toBe('trace');
      await traced.source.close();
      const user = await chooseSource(device, 'auto', { ...options, uid: 1000 });
      expect(user).toMatchObject({ isFallback: true, source: { kind: 'scan' } });
      expect(user.why).toContain('root only');
      await user.source.close();
      const named = chooseSource(device, 'trace', { ...options, uid: 1000 });
      await expect(named).rejects.toMatchObject({
        kind: 'unsupported',
        hint: expect.stringContaining('as root') as string,
      });
      const host = {
        ...traceHost(),
        root: dir.join('nothing'),
        run: () => Promise.resolve({ status: 32, stdout: '', stderr: 'mount: permission denied' }),
      };
      const bare = await chooseSource(device, 'auto', { ...options, host });
      expect(bare.why).toContain('permission denied');
      await bare.source.close();
      await device.close();
      expect(existsSync(dir.join('nothing'))).toBe(false);
    },
  );
});
