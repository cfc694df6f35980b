/** The file that a loop device lies on, when the kernel's requests cannot be read any more. */
import { fstatSync, mkdtempSync, openSync, rmdirSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect, it } from 'vitest';

import type { B2Event } from '../../../src/events.js';
import { BlockFile } from '../../../src/mount/block-file.js';
import { openTemporaryOverlay } from '../../../src/nbd/index.js';
import { MemoryImage } from '../../support/image-memory.js';

it('ends the connection, says so and tells why, when its thread dies', async () => {
  const directory = mkdtempSync(join(tmpdir(), 'b2-block-file-'));
  const image = await openTemporaryOverlay({
    base: new MemoryImage([{ length: 65_536, hole: false }]),
  });
  try {
    // Reading a directory fails with EISDIR, as /dev/fuse never does.
    const fuseFd = openSync(directory, 'r');
    const events: B2Event[] = [];
    const failures: unknown[] = [];
    const file = new BlockFile({
      fuseFd,
      image,
      events: (event) => events.push(event),
      failed: (error) => failures.push(error),
    });
    await expect(file.ended).rejects.toMatchObject({
      kind: 'io',
      message: expect.stringMatching(/cannot be read any more: .*EISDIR/) as string,
    });
    expect(file.isEnded).toBe(true);
    expect(failures).toMatchObject([{ kind: 'io' }]);
    expect(events).toMatchObject([
      { type: 'warning', message: expect.stringContaining('EISDIR') as string },
    ]);
    // With the descriptor the connection is over: nobody waits for an answer.
    expect(() => fstatSync(fuseFd)).toThrow(/EBADF/);
    await file.close();
    await file.close();
  } finally {
    await image.close();
    rmdirSync(directory);
  }
});
