/** A repository is made in a place of its own. */
import { B2Error } from '../../errors.js';
import { CONFIG_COPY_NAME, CONFIG_NAME } from '../../format/names.js';
import type { Store } from '../../repo/store.js';

/**
 * Kind `refused` where the place has objects (or other files) but no configuration of a repository: it is somebody else's, or a damaged
 * repository, which a new configuration would make unreadable. One that has a configuration is left to who makes the repository.
 */
export async function refuseOccupied(store: Store): Promise<void> {
  for (const name of [CONFIG_NAME, CONFIG_COPY_NAME])
    if ((await store.stat(name)) !== undefined) return;
  for await (const { name } of store.list('')) {
    // One that starts at the same time.
    if (name === CONFIG_NAME || name === CONFIG_COPY_NAME) return;
    throw new B2Error(
      'refused',
      `${store.url} holds ${name} but no repository configuration: no new repository is made over it`,
      {
        hint: 'Name a new or empty directory. If this was a repository, put its config file back, or move the directory away.',
      },
    );
  }
}
