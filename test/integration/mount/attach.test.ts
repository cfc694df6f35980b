/** Mounts and unmounts of the kernel, without anybody who serves them. */
import { closeSync, mkdirSync } from 'node:fs';
import { afterEach, expect, it } from 'vitest';

import { attach, detach, type Attached } from '../../../src/mount/attach.js';
import { requires } from '../../support/requires.js';
import { mountsBelow, tempDir, type TempDir } from '../../support/tmp.js';

requires({ root: true, paths: ['/dev/fuse'] }).describe('detach', () => {
  let dir: TempDir | undefined;
  afterEach(() => dir?.remove());

  const end = async ({ fuseFd, watchdog }: Attached): Promise<void> => {
    closeSync(fuseFd);
    await watchdog.stop();
  };

  it('takes no mount away that another has made meanwhile, whatever number the kernel gave it', async () => {
    dir = tempDir();
    const names = ['a', 'b'].map((name) => dir?.join(name) ?? '');
    for (const name of names) mkdirSync(name);
    const [one = '', other = ''] = names;
    const mine = await attach(one);
    expect(await detach(mine.source)).toBe('done');
    // Unless somebody else is quicker, it has the device number that the first one had.
    const next = await attach(other);
    try {
      expect(next.source).not.toBe(mine.source);
      expect(await detach(mine.source)).toBe('gone');
      await end(mine); // the watchdog looks for its mount, too
      expect(mountsBelow(dir.path)).toEqual([other]);
    } finally {
      expect(await detach(next.source)).toBe('done');
      await end(next);
    }
    expect(mountsBelow(dir.path)).toEqual([]);
  });
});
